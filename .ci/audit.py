"""Are there known vulnerabilities in the versions of constraints.txt? Asks OSV (https://osv.dev) through pip-audit.

A known one is a failure that names it (exit status 1), a question that cannot be asked is one too (2). No answer (no
network, no service) is a warning and exit status 0, so that it runs anywhere. Further arguments go to pip-audit:
`--ignore-vuln ID` for one that does not concern this project.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNREACHABLE = ("ConnectionError", "Timeout", "HTTPError", "SSLError", "ServiceError", "Max retries")
"""What pip-audit says when the service gave no answer, and not that it was asked wrongly."""
PATIENCE = 600
"""Seconds for all answers together."""


def main(arguments: list[str]) -> int:
    """Run; returns the exit status."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps"]
    command += ["--disable-pip", "--vulnerability-service", "osv", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=PATIENCE)
        found = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return warn(f"no answer in {PATIENCE} s")
    except (ValueError, KeyError, TypeError):
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no answer")
        if any(word in done.stderr for word in UNREACHABLE):
            return warn(reason)
        print(f"constraints.txt cannot be audited: {reason}")
        return 2
    skipped = [f"{entry['name']}: {entry['skip_reason']}" for entry in found if "skip_reason" in entry]
    for text in skipped:
        print(f"warning: not audited: {text}")
    faults = [(entry, fault) for entry in found for fault in entry.get("vulns", ())]
    for entry, fault in faults:
        fixed = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"{entry['name']} {entry['version']}: {fault['id']}, fixed in {fixed}")
    if not faults:
        print(f"no known vulnerability in {len(found) - len(skipped)} packages")
    return 1 if faults else 0


def warn(reason: str) -> int:
    print(f"warning: constraints.txt was not audited: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
