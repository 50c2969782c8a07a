"""Next-token prediction without MTP: the baseline of every comparison."""

from mtp_jax.config import Config, UserError
from mtp_jax.mtp.kind import Kind


class NoMTP(Kind):
    """MTP kind "none"."""

    name = "none"
    is_baseline = True
    released_path = ()

    @classmethod
    def reads(cls, key: str) -> bool:
        return key == "kind"

    def describe(self) -> str:
        return "next-token only"

    def check(self, config: Config) -> None:
        for key in ("freeze_decoder", "detach_decoder"):
            if getattr(config.mtp, key):
                raise UserError(f"mtp.{key}=true: there are no MTP modules to train; set mtp.kind, or mtp.{key}=false")
