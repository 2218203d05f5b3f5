"""`python deploy/monitoring/generate.py`: writes dashboard.json, prometheus-rule.yaml and docs/runbooks.md from their sources."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from alerts import ALERTS  # noqa: E402
from dashboard import dashboard  # noqa: E402

RUNBOOKS = HERE.parents[1] / "docs/runbooks.md"
RUNBOOK_URL = "docs/runbooks.md"
"""Relative: where the repository is read. An overlay may put an address before it."""
PREFIX = "InstanceManager"


def outputs() -> dict[Path, str]:
    """The text of each generated file."""
    return {
        HERE / "dashboard.json": json.dumps(dashboard(), indent=1) + "\n",
        HERE / "prometheus-rule.yaml": _rule_text(),
        RUNBOOKS: _runbooks(),
    }


def rule_groups() -> dict[str, Any]:
    """What is below `spec`; also a whole file of rules for promtool."""
    rules = [
        {
            "alert": PREFIX + alert.name,
            "expr": alert.expr,
            "for": alert.for_,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "description": alert.means,
                "runbook_url": f"{RUNBOOK_URL}#{(PREFIX + alert.name).lower()}",
            },
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "instance-manager", "rules": rules}]}


def _rule_text() -> str:
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "instance-manager", "labels": {"app.kubernetes.io/name": "instance-manager"}},
        "spec": rule_groups(),
    }
    head = "# Made by generate.py from alerts.py.\n"
    return head + str(yaml.safe_dump(manifest, sort_keys=False, width=160, allow_unicode=True))


def _runbooks() -> str:
    parts = [
        "# Runbooks\n\nOne paragraph for each alert of [prometheus-rule.yaml](../deploy/monitoring/prometheus-rule.yaml). "
        "Made by `deploy/monitoring/generate.py` from `alerts.py`: change it there.\n\n"
        "In all of them the first look is `instance-manager status` on any instance (`kubectl exec pg-0 -- instance-manager status`).\n"
    ]
    for alert in ALERTS:
        parts.append(
            f"\n## {PREFIX}{alert.name}\n\n`{alert.severity}`, after {alert.for_}: `{alert.expr}`\n\n"
            f"**What it means.** {alert.means}\n\n**What to look at.** {alert.look}\n\n**What to do.** {alert.do}\n"
        )
    return "".join(parts)


if __name__ == "__main__":
    for path, text in outputs().items():
        path.write_text(text, encoding="utf-8")
        print(path)
