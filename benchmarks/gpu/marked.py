"""The project's own tests that only a GPU can run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.gpu.kit import Kit

_ROOT = Path(__file__).parents[2]


def marked_tests(kit: Kit) -> None:
    """The tests marked gpu, in files that can be imported here. Libraries' warnings, which are errors where versions
    are pinned, are not errors here."""
    files = sorted(path for path in (_ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    if not files:
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        words = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
        words += ["--continue-on-collection-errors", f"--junitxml={report}", *map(str, files)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        limit = max(1.0, kit.left() - 2)
        try:
            subprocess.run(words, cwd=_ROOT, env=environment, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            kit.line("tests marked gpu", f"stopped after {limit:.0f} s")
            return
        cases = list(ElementTree.parse(report).iter("testcase"))
    absent = [case for case in cases if "No module named" in _text(case, "error")]
    bad = [case for case in cases if case not in absent and (_text(case, "error") or _text(case, "failure"))]
    skipped = [case for case in cases if case.find("skipped") is not None]
    good = len(cases) - len(absent) - len(bad) - len(skipped)
    at = f"{good} passed, {len(skipped)} skipped, {len(files)} files"
    for case in absent:
        kit.line("tests that cannot be imported here", case.get("name", ""), "", _text(case, "error").splitlines()[-1])
    for case in bad:
        kit.line("failed test", f"{case.get('classname')}::{case.get('name')}")
    kit.check("tests marked gpu: failures", float(len(bad)), "", at, most=0)


def _text(case: ElementTree.Element, kind: str) -> str:
    found = case.find(kind)
    return "" if found is None else f"{found.get('message', '')}\n{found.text or ''}".strip()
