"""Writes test/golden/interpolation.json: what OmegaConf makes of ${...} in small YAML documents.

Needs: pip install omegaconf==2.4.0 (any 2.1 or later gives the same). Run from the root of the repository.
"""

import json
import os
import warnings

from omegaconf import OmegaConf

# Each document is asked for its key "a". Numbers inside a text are written so that Python prints them as they stand here.
DOCUMENTS = [
    "a: ${b}\nb: 1",
    "a: ${ b }\nb: 1",
    "a: ${.b}\nb: 1",
    "a: ${b.c.d}\nb: {c: {d: deep}}",
    "a: ${c.d}\nc: {d: '${..b}'}\nb: 2",
    "a: ${c.d}\nc: {d: '${.e}', e: 3}",
    "a: ${c.d.e}\nc: {d: {e: '${...f}'}, f: 4}",
    "a: ${c.d.e}\nc: {d: {e: '${..f}'}, f: 5}",
    "a: ${l[1]}\nl: [x, y]",
    "a: ${l.1}\nl: [x, y]",
    "a: ${l.0}\nl: ['${.1}', y]",
    "a: ${b[c]}\nb: {c: 1}",
    "a: ${${k}.c}\nk: d\nd: {c: 4}",
    "a: ${d.${k}}\nk: c\nd: {c: 4}",
    "a: ${b.c}\nb: ${d}\nd: {c: through}",
    "a: ${b}\nb: ${c}\nc: ${d}\nd: chain",
    "a: x${b}y${c}z\nb: 1\nc: two",
    "a: $b\nb: 1",
    "a: ${b}}\nb: 1",
    "a: '{${b}}'\nb: 1",
    "a: ${b}\nb: ~",
    "a: \\${b}\nb: 1",
    "a: \\\\${b}\nb: 1",
    "a: \\\\\\${b}\nb: 1",
    "a: x\\y${b}\nb: 1",
    "a: x\\\\y\\${b}\nb: 1",
    "a: ${b}\\${c}\nb: 1",
    "a: \\${b} ${c}\nc: 1",
    "a: \\\\x",
    "a: ${oc.env:DISTILL_GOLDEN}",
    "a: pre-${oc.env:DISTILL_GOLDEN}-post",
    "a: ${oc.env:DISTILL_GOLDEN,other}",
    "a: ${oc.env:DISTILL_UNSET,3}",
    "a: ${oc.env:DISTILL_UNSET, padded }",
    "a: ${oc.env:DISTILL_UNSET,/a/b:c-d}",
    "a: ${oc.env:DISTILL_UNSET,''}",
    "a: ${oc.env:DISTILL_UNSET,'a}b'}",
    "a: ${oc.env:DISTILL_UNSET,'a, b'}",
    "a: ${oc.env:DISTILL_UNSET,null}",
    "a: ${oc.env:DISTILL_UNSET,${b}}\nb: 7",
    "a: ${oc.env:DISTILL_UNSET,${oc.env:DISTILL_GOLDEN}}",
    "a: ${oc.env:DISTILL_UNSET,${oc.env:DISTILL_UNSET,last}}",
    "a: ${oc.env:${b}}\nb: DISTILL_GOLDEN",
    # errors
    "a: ${oc.env:DISTILL_UNSET}",
    "a: ${oc.env:DISTILL_UNSET,x,y}",
    "a: ${oc.nothing:x}",
    "a: ${b",
    "a: ${}",
    "a: ${b}",
    "a: ${b.c}\nb: 1",
    "a: ${l.2}\nl: [x, y]",
    "a: ${a}",
    "a: ${b}\nb: ${a}",
    "a: x${b}\nb: y${c}\nc: ${a}",
    "a: ${c.d}\nc: {d: '${c}'}",
    "a: ${..b}\nb: 1",
    "a: ${c.d}\nc: {d: '${...b}'}\nb: 1",
]


def resolved(document):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = OmegaConf.to_container(OmegaConf.create(document), resolve=True)["a"]
        except Exception:
            return {"document": document, "error": True}
    return {"document": document, "value": None if value is None else str(value)}


def main():
    os.environ["DISTILL_GOLDEN"] = "from the environment"
    os.environ.pop("DISTILL_UNSET", None)
    os.makedirs("test/golden", exist_ok=True)
    with open("test/golden/interpolation.json", "w") as out:
        json.dump([resolved(document) for document in DOCUMENTS], out, indent=1)
        out.write("\n")


if __name__ == "__main__":
    main()
