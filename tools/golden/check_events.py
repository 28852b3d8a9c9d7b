#!/usr/bin/env python3
"""Reads a run's metrics with the programs that users have (TensorBoard's loader, h5py) and compares with metrics.csv.

    pip install tensorboard==2.21.0 h5py==3.16.0
    tools/golden/check_events.py LOGGING_DIR/EXP_NAME

Works on finished runs, running ones and what a killed one left. After a resume it shows that TensorBoard drops the steps
that were run again.
"""

import csv
import pathlib
import sys

import h5py
import numpy
from tensorboard.backend.event_processing import event_accumulator


def read_csv(path):
    """name → list of (step, wall_time, value) of the steps that have one."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("step", "wall_time")]
    return {
        name: [(int(row["step"]), float(row["wall_time"]), float(row[name])) for row in rows if row[name]]
        for name in names
    }


def same(a, b):
    return numpy.array_equal(numpy.asarray(a), numpy.asarray(b), equal_nan=True)


def check_hdf5(path, expected):
    with h5py.File(path, "r", swmr=True) as file:
        for name, points in expected.items():
            stored = file[name][:]
            for column, field in enumerate(("step", "wall_time", "value")):
                assert same(stored[field], [point[column] for point in points]), f"{path}: {name} {field}"


def check_events(folder, expected):
    # 0: no sampling, all events
    loader = event_accumulator.EventAccumulator(str(folder), size_guidance={event_accumulator.TENSORS: 0,
                                                                            event_accumulator.SCALARS: 0})
    loader.Reload()
    with_points = {name: points for name, points in expected.items() if points}
    assert set(loader.Tags()["scalars"]) == set(with_points), loader.Tags()
    for name, points in with_points.items():
        events = loader.Scalars(name)
        steps = [event.step for event in events]
        assert steps == [point[0] for point in points], f"{name}: steps {steps}"
        assert numpy.allclose([event.wall_time for event in events], [point[1] for point in points], atol=6e-4, rtol=0)
        assert same(numpy.float32([event.value for event in events]), numpy.float32([p[2] for p in points])), name


def main():
    folder = pathlib.Path(sys.argv[1])
    expected = read_csv(folder / "metrics.csv")
    check_hdf5(folder / "metrics.h5", expected)
    check_events(folder, expected)
    count = sum(len(points) for points in expected.values())
    files = len(list(folder.glob("events.out.tfevents.*")))
    print(f"{folder}: {len(expected)} metrics, {count} points: metrics.h5 equals metrics.csv to the last digit, "
          f"TensorBoard shows the same from {files} event file(s)")


if __name__ == "__main__":
    main()
