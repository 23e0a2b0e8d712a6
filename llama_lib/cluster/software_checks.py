"""What runs on a host: this project's code, Python and the packages.

Invariant: versions are held against the starting host's and against the tested set; a package with
both faults is named once.
"""

from llama_lib.cluster.examination import Examined
from llama_lib.cluster.problem import Job, Problem, some
from llama_lib.versions import INSTALL, judge


def code(each: Examined, job: Job) -> list[Problem]:
    root, folder = job.questions.root, job.questions.folder
    copy = f"rsync -a {root}/ {{host}}:{root}/, or keep it on a file system that all hosts share"
    theirs, ours = each.facts.get("code") or {}, job.here.facts.get("code") or {}
    name = each.host.name
    if not any(path.startswith("llama_lib/") for path in theirs):
        what = f"no code: {root} has {len(theirs)} source files, expected {len(ours)} and llama_lib"
        return [Problem(name, "code", "no code", what, copy)]
    found = []
    if not each.facts.get("folder"):
        what = f"no folder {folder}, from which the job would start"
        mend = "make it there, or start from a folder that all hosts have"
        found.append(Problem(name, "code", "no folder", what, mend))
    kinds = {
        "changed": [path for path in ours if path in theirs and theirs[path] != ours[path]],
        "missing": [path for path in ours if path not in theirs],
        "only there": [path for path in theirs if path not in ours],
    }
    parts = [f"{some(paths)} {kind}" for kind, paths in kinds.items() if paths]
    if parts:
        count = sum(map(len, kinds.values()))
        short = f"{count} file{'s' if count > 1 else ''} differ{'' if count > 1 else 's'}"
        what = f"its code in {root} is not that of the starting host: {'; '.join(parts)}"
        found.append(Problem(name, "code", short, what, copy))
    return found


def python(each: Examined, job: Job) -> list[Problem]:
    name, theirs = each.host.name, each.facts.get("python")
    ours = job.here.facts.get("python")
    if not each.facts.get("python_found"):
        path = job.here.facts.get("executable")
        what = f"no Python at {path}: got {each.facts.get('executable')} {theirs}"
        mend = "install it at that path, or start the job with a Python that all hosts have"
        return [Problem(name, "python", "not there", what, mend)]
    if theirs != ours:
        what = f"Python: got {theirs}, expected {ours} as on the starting host"
        return [Problem(name, "python", str(theirs), what, f"install Python {ours} there")]
    _, untested = judge({}, str(theirs))
    return [
        Problem(name, "python", str(theirs), line, "install a tested version")
        for line in untested
        if line.startswith("Python:")
    ]


def packages(each: Examined, job: Job) -> list[Problem]:
    theirs, ours = each.facts.get("packages") or {}, job.here.facts.get("packages") or {}
    if not each.facts.get("python_found") or not theirs:
        return []
    name = each.host.name
    differing = [package for package in ours if theirs.get(package) != ours[package]]
    found = []
    for package in differing:
        got, expected = theirs.get(package), ours[package]
        what = (
            f"{package}: got {got or 'none'}, expected {expected or 'none'} as on the starting host"
        )
        mend = f"install {package} {expected} there" if expected else INSTALL
        found.append(Problem(name, "packages", f"{package} {got or 'missing'}", what, mend))
    same = {package: version for package, version in theirs.items() if package not in differing}
    missing, untested = judge({**ours, **same}, "")
    for line in [*missing, *untested]:
        package = line.split(":")[0].split()[0]
        if package in same:
            short = f"{package} {same[package] or 'missing'}"
            found.append(Problem(name, "packages", short, line.split(": run")[0], INSTALL))
    return found
