"""The trained subnets of a ranking, by which a search corrects inherited losses."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from automoe_jax.architecture.subnet import Subnet, from_json, to_json
from automoe_jax.config import RunConfig
from automoe_jax.search import calibration
from automoe_jax.search.calibration import Calibration
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError

STORED = "calibration.json"
_RANKING = "ranking"  # kind of the folder that holds the file


@dataclasses.dataclass(frozen=True)
class TrainedSubnets:
    """Subnets and their validation losses after training from scratch, nats a token."""

    subnets: list[Subnet]
    losses: list[float]

    @property
    def digest(self) -> str:
        """Identifies the content, for a manifest."""
        rows = [[to_json(s), loss] for s, loss in zip(self.subnets, self.losses, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def calibration(
        self, inherited: Callable[[list[Subnet]], list[float]], folder: Path
    ) -> Calibration:
        """The correction of a supernet that gives these subnets `inherited` losses.

        The losses are computed once and kept in the search's `folder`, so that a search that goes
        on has the same correction to the last bit.
        """
        path = folder / STORED
        if not path.exists():
            files.write_json(path, {"version": 1, "inherited": inherited(self.subnets)})
        losses = files.read_json(path, "calibration")["inherited"]
        return calibration.fit(self.subnets, losses, self.losses)


def read(path: str | Path, config: RunConfig) -> TrainedSubnets:
    """Reads the trained subnets of a `rank.json`; `UserError` if they do not fit a config.

    Text and tokenizer are compared where the ranking's manifest is beside the file.
    """
    name = f"search.calibration={path}"
    rows = files.read_json(path, _RANKING)
    rows = rows.get("subnets") if isinstance(rows, dict) else None
    try:
        subnets = [from_json(row["subnet"]) for row in rows or ()]
        losses = [float(row["trained"]) for row in rows or ()]
    except (KeyError, TypeError, ValueError, AttributeError):
        subnets = losses = []
    if not subnets or not all(map(math.isfinite, losses)):
        raise UserError(f"{name} is no ranking; give the rank.json of launch/rank.py")
    if len(subnets) < calibration.FEWEST:
        raise UserError(
            f"{name} has {len(subnets)} trained subnets; at least {calibration.FEWEST} are needed: "
            "launch/rank.py --subnets=16"
        )
    for i, subnet in enumerate(subnets, 1):
        try:
            config.space.validate(subnet)
        except UserError as e:
            raise UserError(f"{name}, subnet {i}: {e}") from None
    folder = Path(path).parent
    if (folder / workdir.MANIFEST).exists():
        made = workdir.settings(folder, _RANKING)
        for group in ("data", "tokenizer"):
            if not workdir.same(made.get(group), getattr(config, group)):
                raise UserError(
                    f"{name} was made with another group {group} of the config, so its losses are "
                    "of other text; give a ranking of this corpus"
                )
    return TrainedSubnets(subnets, losses)
