#include "io/hdf5_sink.h"

#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <span>
#include <sstream>
#include <utility>

#include "core/error.h"
#include "io/durable_file.h"
#include "io/hdf5_library.h"

namespace distill {

namespace {

using hdf5::Id, hdf5::must, hdf5::must_read, hdf5::take_turn;

// Elements of a chunk, which is written anew with each of them: 3 kB.
constexpr hsize_t chunk = 128;
// Of the file: names of the datasets in their order, a line each.
constexpr const char* names_attribute = "metrics";

hid_t point_type() {
  const hid_t type = H5Tcreate(H5T_COMPOUND, sizeof(MetricPoint));
  H5Tinsert(type, "step", HOFFSET(MetricPoint, step), H5T_STD_I64LE);
  H5Tinsert(type, "wall_time", HOFFSET(MetricPoint, wall_time), H5T_IEEE_F64LE);
  H5Tinsert(type, "value", HOFFSET(MetricPoint, value), H5T_IEEE_F64LE);
  return type;
}

// SWMR needs the newest format.
hid_t file_access() {
  const hid_t access = hdf5::unlocked_access();
  H5Pset_libver_bounds(access, H5F_LIBVER_LATEST, H5F_LIBVER_LATEST);
  return access;
}

void append(hid_t dataset, std::uint64_t size, std::span<const MetricPoint> added, const std::string& path) {
  const hsize_t first = size, count = added.size(), whole = size + count;
  must(H5Dset_extent(dataset, &whole) >= 0, path, "write");
  const Id type(point_type(), H5Tclose), space(H5Dget_space(dataset), H5Sclose),
      memory(H5Screate_simple(1, &count, nullptr), H5Sclose);
  H5Sselect_hyperslab(space, H5S_SELECT_SET, &first, nullptr, &count, nullptr);
  must(H5Dwrite(dataset, type, memory, space, H5P_DEFAULT, added.data()) >= 0, path, "write");
}

void make_dataset(hid_t file, const MetricSeries& series, const std::string& path) {
  const Id link(H5Pcreate(H5P_LINK_CREATE), H5Pclose), layout(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_create_intermediate_group(link, 1);
  H5Pset_chunk(layout, 1, &chunk);
  const hsize_t none = 0, unlimited = H5S_UNLIMITED;
  const Id type(point_type(), H5Tclose), space(H5Screate_simple(1, &none, &unlimited), H5Sclose);
  const Id dataset(H5Dcreate2(file, series.name.c_str(), type, space, link, layout, H5P_DEFAULT), H5Dclose);
  must(dataset >= 0, path, "write " + series.name);
  if (!series.points.empty()) append(dataset, 0, series.points, path);
}

bool put_names(hid_t file, const std::vector<MetricSeries>& all) {
  std::string names;
  for (const MetricSeries& series : all) names += series.name + '\n';
  const Id type(H5Tcopy(H5T_C_S1), H5Tclose), space(H5Screate(H5S_SCALAR), H5Sclose);
  H5Tset_size(type, std::max<std::size_t>(names.size(), 1));
  const Id attribute(H5Acreate2(file, names_attribute, type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
  return H5Awrite(attribute, type, names.c_str()) >= 0;
}

std::vector<std::string> get_names(hid_t file, const std::string& path) {
  const Id attribute(H5Aopen(file, names_attribute, H5P_DEFAULT), H5Aclose), type(H5Aget_type(attribute), H5Tclose);
  check_input(H5Tget_class(type) == H5T_STRING && H5Tis_variable_str(type) == 0, path,
              ": has no list of metrics: expected a metrics.h5 of distill");
  std::string list(H5Tget_size(type), '\0');
  must_read(H5Aread(attribute, type, list.data()) >= 0, path, "read the list of metrics");
  std::vector<std::string> names;
  std::istringstream lines(list);
  for (std::string name; std::getline(lines, name);) names.push_back(name);
  return names;
}

// The whole file with all its datasets: those made after SWMR has started would be lost when the writer is killed.
void make_file(const std::string& path, const std::vector<MetricSeries>& all) {
  {
    const Id access(file_access(), H5Pclose);
    const Id file(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access), H5Fclose);
    must(file >= 0, path, "create");
    must(put_names(file, all), path, "write");
    for (const MetricSeries& series : all) make_dataset(file, series, path);
    must(H5Fflush(file, H5F_SCOPE_GLOBAL) >= 0, path, "write");
  }
  sync_path(path);
}

MetricSeries read_series(hid_t file, const std::string& path, const std::string& name) {
  const Id dataset(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose);
  must_read(dataset >= 0, path, "read " + name);
  const Id type(point_type(), H5Tclose), space(H5Dget_space(dataset), H5Sclose);
  check_input(H5Sget_simple_extent_ndims(space) == 1, path, ": ", name, " is not a list of points");
  MetricSeries series{name, std::vector<MetricPoint>(std::size_t(H5Sget_simple_extent_npoints(space)))};
  must_read(series.points.empty() || H5Dread(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, series.points.data()) >= 0,
            path, "read " + name);
  return series;
}

}  // namespace

Hdf5Sink::Hdf5Sink(const std::string& path, const std::vector<MetricSeries>& so_far, Warn warn)
    : path_(path), warn_(std::move(warn)) {
  const auto turn = take_turn();
  const std::string fresh = path + ".partial";
  make_file(fresh, so_far);
  std::error_code error;
  std::filesystem::rename(fresh, path, error);
  check_input(!error, path, ": cannot be replaced: ", error.message());
  const Id access(file_access(), H5Pclose);
  file_ = H5Fopen(path.c_str(), H5F_ACC_RDWR | H5F_ACC_SWMR_WRITE, access);
  must(file_ >= 0, path, "open");
  for (const MetricSeries& series : so_far) {
    datasets_.push_back({series.name, H5Dopen2(file_, series.name.c_str(), H5P_DEFAULT), series.points.size()});
    must(datasets_.back().id >= 0, path, "open " + series.name);
  }
}

Hdf5Sink::~Hdf5Sink() {
  const auto turn = take_turn();
  for (const Dataset& dataset : datasets_) H5Dclose(dataset.id);
  H5Fclose(file_);
}

Hdf5Sink::Dataset& Hdf5Sink::dataset(const std::string& name) {
  const auto found = std::find_if(datasets_.begin(), datasets_.end(), [&](const Dataset& d) { return d.name == name; });
  check(found != datasets_.end(), "metric ", name, " has no dataset in ", path_);
  return *found;
}

void Hdf5Sink::write(const MetricRecord& record) {
  if (is_over_) return;
  const auto turn = take_turn();
  const double wall_time = std::round(record.wall_time * 1e3) / 1e3;  // as metrics.csv has it
  std::vector<std::pair<Dataset*, MetricPoint>> added;
  for (const auto& [name, value] : record.values) added.push_back({&dataset(name), {record.step, wall_time, value}});
  try {
    for (const auto& [to, point] : added) append(to->id, to->size++, {&point, 1}, path_);
    must(H5Fflush(file_, H5F_SCOPE_LOCAL) >= 0, path_, "write");
  } catch (const Error& error) {
    is_over_ = true;
    warn_(text(error.what(), "; the file ends before step ", record.step));
  }
}

// Each write() has handed all to the system, so no turn is needed.
void Hdf5Sink::sync() {
  try {
    sync_path(path_);
  } catch (const Error& error) {
    if (!sync_warned_) warn_(error.what());
    sync_warned_ = true;
  }
}

std::vector<MetricSeries> read_hdf5_metrics(const std::string& path) {
  const auto turn = take_turn();
  const Id access(file_access(), H5Pclose);
  const Id file(H5Fopen(path.c_str(), H5F_ACC_RDONLY | H5F_ACC_SWMR_READ, access), H5Fclose);
  must_read(file >= 0, path, "read");
  std::vector<MetricSeries> all;
  for (const std::string& name : get_names(file, path)) all.push_back(read_series(file, path, name));
  return all;
}

}  // namespace distill
