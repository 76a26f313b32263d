"""The templates of every report page: each printed value is made legible and escaped, wherever it comes from."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from keelguard.plots import legible

if TYPE_CHECKING:
    from jinja2 import Environment


def page_environment(**filters: Callable[..., Any]) -> "Environment":
    """The templates with some filters of a page's own; an undefined name in a template is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        """Every value that a template prints passes here before it is escaped."""
        return legible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("keelguard", "templates"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment
