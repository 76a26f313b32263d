"""The checks of a gate as JUnit XML, which every continuous integration shows: one test case per check.

A failed check is a `failure`, one that is not evaluable an `error`, or `skipped` where the policy lets it through.
"""

from collections.abc import Sequence
from xml.etree import ElementTree

from keelguard.pipeline.check import Check
from keelguard.plots import legible

_SUITE = "keelguard gate"


def to_junit(checks: Sequence[Check], strict: bool) -> str:
    """The XML, the same for the same checks: no times, no names of machines.

    Args:
        strict: whether what is not evaluable counts as an error.
    """
    open_checks = sum(check.ruling == "not evaluable" for check in checks)
    counts = {
        "tests": len(checks),
        "failures": sum(check.ruling == "fail" for check in checks),
        "errors": open_checks if strict else 0,
        "skipped": 0 if strict else open_checks,
    }
    numbers = {name: str(count) for name, count in counts.items()}
    root = ElementTree.Element("testsuites", {"name": _SUITE, **numbers})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _SUITE, **numbers})
    for check in checks:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": f"{_SUITE}.{check.kind}", "name": _text(check.name)}
        )
        if check.ruling == "pass":
            ElementTree.SubElement(case, "system-out").text = _text(check.reason)
            continue
        tag = "failure" if check.ruling == "fail" else "error" if strict else "skipped"
        found = ElementTree.SubElement(case, tag, {"message": _text(check.reason)})
        if tag != "skipped":
            found.set("type", check.ruling)
        found.text = _text(check.rule)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _text(text: str) -> str:
    """The text without the characters that XML does not allow."""
    return legible(text)
