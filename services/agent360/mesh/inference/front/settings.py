"""What can be set of the OpenAI-compatible front."""

from __future__ import annotations

from pydantic import Field

from agent360.mesh.runtime.settings import Settings
from agent360.mesh.runtime.validation import TENANT_PATTERN


class FrontSettings(Settings):
    """The OpenAI-compatible API on the HTTP port."""

    enabled: bool = True
    """Whether it is served."""
    default_tenant: str = Field(
        default="default", pattern=rf"^({TENANT_PATTERN.pattern})?$", max_length=63
    )
    """The tenant of requests without the header ``x-agent360-tenant`` whose key is bound to not
    just one tenant, if the key may speak for it; empty: such requests are refused."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """How long a request's body may take to arrive, in seconds."""
