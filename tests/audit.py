"""`make audit`: are there known holes in what we depend on, and what do we depend on?

Exit codes: 0 every pinned package was compared with an advisory source and has no known hole; 1 holes were found; 2 nothing can
be said, because no advisory source was reachable or a package is not known there. The SBOM (CycloneDX, JSON) is written in any
case. pip-audit alone ends with 0 when its source knows none of the packages.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
SBOM = ROOT / "build" / "sbom.cdx.json"
TIMEOUT_S = 120
SOURCES = ("pypi", "osv")


def packages(text: str) -> set[str]:
    """Normalised names of a lock file."""
    return {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in text.splitlines()
        if line and not line.startswith("#")
    }


def judge(report: str, wanted: set[str]) -> tuple[int, str]:
    """Exit code and words for what pip-audit has reported as JSON."""
    try:
        found = json.loads(report)["dependencies"]
        answered = {re.sub(r"[-_.]+", "-", each["name"]).lower() for each in found if "skip_reason" not in each}
        holes = [f"{each['name']} {each['version']}: {hole['id']}" for each in found for hole in each.get("vulns", ())]
    except (ValueError, KeyError, TypeError):
        return 2, "no report"
    if holes:
        return 1, "known holes:\n" + "\n".join(holes)
    if missing := wanted - answered:
        return 2, f"{len(missing)} of {len(wanted)} packages are not known to it, such as {min(missing)}"
    return 0, f"{len(wanted)} packages, no known hole"


def run_audit(source: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), "--no-deps", "--disable-pip"]
    argv += ["--vulnerability-service", source, "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return 2, f"no answer within {TIMEOUT_S} s"
    code, words = judge(ended.stdout, packages(LOCK.read_text(encoding="utf-8")))
    if words == "no report":
        words = (ended.stderr.strip().splitlines() or ["no output"])[-1][-200:]
    return code, words


def write_sbom() -> int:
    """Of the lock file; validated by its own tool."""
    SBOM.parent.mkdir(exist_ok=True)
    argv = [
        sys.executable,
        "-m",
        "cyclonedx_py",
        "requirements",
        str(LOCK),
        "--pyproject",
        str(ROOT / "pyproject.toml"),
    ]
    argv += ["--output-format", "JSON", "--output-reproducible", "--output-file", str(SBOM)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if ended.returncode != 0:
        print(f"SBOM: {ended.stderr.strip()[-1000:]}", file=sys.stderr)
        return 2
    components = json.loads(SBOM.read_text(encoding="utf-8"))["components"]
    if {each["name"].lower().replace("_", "-") for each in components} != {
        name.replace(".", "-") for name in packages(LOCK.read_text(encoding="utf-8"))
    }:
        print("SBOM: its components are not those of constraints.txt", file=sys.stderr)
        return 2
    print(f"SBOM: {len(components)} components in {SBOM.relative_to(ROOT)}")
    return 0


def main() -> int:
    if (code := write_sbom()) != 0:
        return code
    for source in SOURCES:
        code, words = run_audit(source)
        print(f"audit against {source}: {words}", file=sys.stderr if code else sys.stdout)
        if code in (0, 1):
            return code
    print("audit: no advisory source could be asked for everything; nothing is known, so this fails", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
