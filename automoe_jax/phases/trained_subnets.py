"""The trained subnets of a ranking, by which a search corrects inherited losses."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet, from_json
from automoe_jax.search import calibration
from automoe_jax.search.calibration import Calibration
from automoe_jax.system import files
from automoe_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainedSubnets:
    """Subnets and their validation losses after training from scratch, nats a token."""

    subnets: list[Subnet]
    losses: list[float]

    @property
    def digest(self) -> str:
        """For a manifest."""
        return hashlib.sha256(repr((self.subnets, self.losses)).encode()).hexdigest()[:16]

    def calibration(self, inherited: Callable[[list[Subnet]], list[float]]) -> Calibration:
        """The correction of a supernet that gives these subnets `inherited` losses."""
        return calibration.fit(self.subnets, inherited(self.subnets), self.losses)


def read(path: str | Path, space: SearchSpace) -> TrainedSubnets:
    """Those of the file that `launch/rank.py` writes; `UserError` if they do not serve a space."""
    rows = files.read_json(path, "ranking")
    rows = rows.get("subnets") if isinstance(rows, dict) else None
    try:
        subnets = [from_json(row["subnet"]) for row in rows or ()]
        losses = [float(row["trained"]) for row in rows or ()]
    except (KeyError, TypeError, ValueError, AttributeError):
        subnets = losses = []
    if not subnets:
        raise UserError(
            f"search.calibration={path} is no ranking; give the rank.json of launch/rank.py"
        )
    if len(subnets) < calibration.FEWEST:
        raise UserError(
            f"search.calibration={path} has {len(subnets)} trained subnets; at least "
            f"{calibration.FEWEST} are needed: launch/rank.py --subnets=16"
        )
    for i, subnet in enumerate(subnets, 1):
        try:
            space.validate(subnet)
        except UserError as e:
            raise UserError(f"search.calibration={path}, subnet {i}: {e}") from None
    return TrainedSubnets(subnets, losses)
