"""Bodies of calls for adapters and of fine-tuning jobs."""

from typing import Annotated, Any, Literal

from pydantic import Field

from veratune.serving.http.schemas.base import ApiBody, StrictBody


class LoadAdapterBody(ApiBody):
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

    lora_name: str
    lora_path: str = ""
    lora_int_id: int | None = None


class RollBackBody(StrictBody):
    """POST /v1/adapters/{name}/rollback."""

    version: Annotated[int, Field(ge=1, lt=2**31)]


Auto = Literal["auto"]


class Hyperparameters(StrictBody):
    """OpenAI's hyperparameters of a job."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class Supervised(StrictBody):
    """Settings of the method "supervised"."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(StrictBody):
    """How a job trains."""

    type: Literal["supervised"] = "supervised"
    supervised: Supervised = Supervised()


class VeraSettings(StrictBody):
    """Flags of `veratune train` that OpenAI's API has no word for."""

    rank: int | None = Field(default=None, ge=1, le=16384)
    targets: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        default=None, min_length=1, max_length=100
    )
    lr: float | None = Field(default=None, gt=0, le=100)
    max_length: int | None = Field(default=None, ge=2, le=32768)
    max_steps: int | None = Field(default=None, ge=1, le=10**7)
    mixed_precision: Literal["auto", "no", "bf16"] | None = None


class JobBody(StrictBody):
    """POST /v1/fine_tuning/jobs."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = Field(default=None, max_length=128)
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    vera: VeraSettings = VeraSettings()

    def settings(self, base_lr: float) -> dict[str, Any]:
        """The flags of `veratune train`.

        Args:
            base_lr: The learning rate that a multiplier of 1 stands for.
        """
        given = self.hyperparameters or (self.method or Method()).supervised.hyperparameters
        flags: dict[str, Any] = {
            "epochs": given.n_epochs,
            "batch_size": given.batch_size,
            "seed": self.seed,
        }
        if given.learning_rate_multiplier != "auto":
            flags["lr"] = base_lr * given.learning_rate_multiplier
        flags |= self.vera.model_dump(exclude_none=True)
        return {key: value for key, value in flags.items() if value not in (None, "auto")}
