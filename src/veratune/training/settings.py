"""TrainSettings: one training run, as its flags and its run.yaml say it."""

import dataclasses
import math
from typing import Any, Literal

from veratune.errors import ConfigError

Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run.

    Args:
        model: the base model: a folder, a .gguf file, or a Hugging Face id.
        task: text-classification, text-regression, instruction, causal-lm, preference, reward,
            grpo, seq2seq, embedding, reranker, image-classification, object-detection,
            image-text-to-text, speech-recognition, text-to-image or unconditional-image.
        data: training rows: a file (jsonl, json, csv, tsv, parquet, txt), a folder of files named
            after their splits, or a Hugging Face data set id.
        out: folder for the adapter, checkpoints, logs and results; it must be empty unless resume
            is set.
        data_config: configuration of the data set id, such as mrpc.
        split: split of `data` to train on.
        eval_data: rows to evaluate on after each epoch, in the same forms. Default: the split
            `eval_split` of `data`, where `data` is a folder that has it; else no evaluation.
        eval_split: split to evaluate on.
        columns: the data's column for each role of the task, such as {"text": "sentence1"}.
        ignore_columns: columns of the data that are left out without a warning.
        max_length: longest example, in tokens (tasks on text; default 512).
        on_overflow: what is done with an example longer than max_length: "drop" it (default of task
            instruction), "truncate" it (default of text-classification and text-regression), or
            "fail". The number of such examples is reported.
        system: system message before every conversation (task instruction).
        train_on: the turns of the assistant with the loss (task instruction): "all" (the default),
            the "last" one of each conversation, or "weights": all whose message has no weight 0.
        chat_template: a chat template instead of the tokenizer's (task instruction): a Jinja file,
            or the name of one that TRL ships, such as qwen2_5. The adapter file records it.
        prompt: the user's message where rows have an image and a completion alone, such as
            "Describe the image." (task image-text-to-text).
        allow_urls: fetch images that rows name by an http(s) address (task image-text-to-text).
        max_seconds: longest recording (task speech-recognition; default 30).
        language: the language that a multilingual Whisper writes, such as german (task
            speech-recognition).
        image_size: side of the images, in pixels (tasks on images). Default: the processor's own.
        augment: what is done to training images: nothing, "flip" (left and right, at random), or
            "crop" (a random part of at least 0.35 of the image, and flip).
        bad_images: "fail" at an image that cannot be read, or "skip" it with a warning that names
            it.
        bad_boxes: "fail" at an empty box or one outside its image, or "clip" it (task
            object-detection).
        prompts: what the sample grids are drawn for (task text-to-image); default: the first four
            captions.
        caption: the text of images that have none, such as "a photo of a sks dog" (task
            text-to-image).
        sample_steps: denoising steps for the sample grids (tasks that generate images; default 25).
        min_snr: gamma of the min-SNR weights of the loss (tasks that generate images); 0 for none.
        train_text_encoder: adapt the text encoder too, with the same targets (task text-to-image).
        loss: of task preference: "dpo" (default), "ipo", "orpo", "kto" or "simpo".
        beta: strength of the pull to the reference policy (tasks preference and grpo); IPO's tau,
            ORPO's lambda, SimPO's scale. Default: 0.1, of SimPO 2, of grpo 0.
        reference: reference policy of task preference: "base", the base model without an adapter
            (default), or "start", the adapter that the run starts from.
        simpo_gamma: target margin of loss simpo; default 1.
        reward: rewards of task grpo: exact-match, regex, json-schema, code-tests, math, or
            module:function under TRL's contract.
        reward_weights: their weights, as [1, 0.5]; default: 1 each.
        reward_options: columns that rewards read and that are the same for all rows, such as
            {"pattern": "[0-9]+"}.
        on_reward_error: "stop" at a sample on which a reward raises or returns no finite number
            (default), or "skip" that reward with a warning.
        num_generations: completions of one prompt that GRPO compares; default 8.
        max_completion_length: longest rollout, in tokens (task grpo; default 256).
        temperature: sampling temperature of rollouts (task grpo; default 1).
        rollouts: what generates rollouts: "transformers" (default), or "engine", that of
            veratune serve in the same process (task grpo, method vera).
        start_adapter: adapter file to start from, in place of d = d_init and b = 0 (method vera);
            its configuration is the run's.
        method: what is trained: "vera"; "head" (the task's output alone), "bitfit" (all biases and
            the head), "full"; "houlsby", "pfeiffer", "lin" or "adapterdrop" (adapter layers),
            "dylora", "lora-fa"; or "peft:" and a method of PEFT, such as peft:lora.
        options: settings of such a method, such as {"r": 8}; the layers of a LoRA or a PEFT method
            are those of `targets`.
        batch_norm: "frozen" keeps the base model's batch statistics, and their scale and shift;
            "train" trains a copy of these layers, which is stored as a part of the head. Default:
            frozen, or train with method full.
        lr: peak learning rate of the vectors d and b (of what the method trains beside the head),
            per step.
        find_lr: choose lr by a range test first, in which the rate rises until the loss diverges;
            --lr find says the same. lr-find.png in `out` shows it.
        b_lr: peak learning rate of the vectors b alone (method vera); default: lr.
        head_lr: peak learning rate of the head, per step. Default: 1e-2 for tasks on text with a
            head, else 1e-3. Regression multiplies it by the standard deviation of the targets.
        weight_decay: of AdamW, on vectors and head.
        batch_size: examples in one forward pass of one process.
        group_by_length: make batches of examples of like length: less padding, so faster, and less
            random.
        packing: put several examples into rows of max_length tokens (task instruction): no padding,
            and no example sees another. batch_size then counts rows.
        padding_free: pack the examples of each batch among themselves (task instruction): the same
            batches and the same loss as without, and little padding.
        streaming: encode examples as they are read, with bounded memory (tasks instruction and
            causal-lm); wants max_steps. Examples are shuffled among the next 1,000.
        num_workers: processes that load batches; 0: the run's own.
        gradient_accumulation_steps: forward passes per optimizer step.
        epochs: passes over the data.
        max_steps: optimizer steps; over 0 it goes before epochs.
        warmup_ratio: share of all steps in which the learning rate rises, in [0, 1).
        warmup_steps: their number; over 0 it goes before warmup_ratio. The last step of a run
            is never warm-up.
        lr_scheduler: how the learning rate falls after that.
        ema: decay of an exponential moving average of the trained values, which is what is kept in
            the end; 0 for none.
        max_grad_norm: largest norm of the gradient; 0 for none.
        keep: the adapter of the "best" evaluation, or the "last" one. Default: best with evaluation
            data and without ema.
        patience: evaluations without a better score before the run stops; 0: never stops early.
        seed: of data order, dropout and the head's start.
        basis_seed: of the frozen matrices A and B.
        label_smoothing: weight of the uniform distribution in the targets of the cross entropy, in
            [0, 1).
        base_dtype: of the frozen weights.
        attn_implementation: attention of transformers: eager, sdpa, flash_attention_2,
            flash_attention_3 or flex_attention. Default: the model's own, mostly sdpa.
        mixed_precision: "bf16" computes matrix products in bfloat16 by autocast, about twice as
            fast where the processor can; "fp16" in float16 with a scaled loss, for GPUs without
            bfloat16; "auto" is bf16 on a GPU with a bfloat16 base, "no" is neither.
        quantize: load the base with bitsandbytes in 4 or 8 bits.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        save_steps: optimizer steps between checkpoints; 0: one after each epoch.
        report_to: loggers that Trainer knows: tensorboard, wandb, trackio.
        resume: go on from the last whole checkpoint in `out`.
        preview: training examples to show first, with the part that the loss is on.
        device: where to compute; auto takes a GPU if there is one.
    """

    model: str
    task: str
    data: str
    out: str
    data_config: str | None = None
    split: str = "train"
    eval_data: str | None = None
    eval_split: str = "validation"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    ignore_columns: list[str] = dataclasses.field(default_factory=list)
    max_length: int | None = None
    on_overflow: Literal["drop", "truncate", "fail"] | None = None
    system: str | None = None
    train_on: Literal["all", "last", "weights"] | None = None
    chat_template: str | None = None
    prompt: str | None = None
    allow_urls: bool | None = None
    max_seconds: float | None = None
    language: str | None = None
    image_size: int | None = None
    augment: Literal["none", "flip", "crop"] | None = None
    bad_images: Literal["fail", "skip"] | None = None
    bad_boxes: Literal["fail", "clip"] | None = None
    prompts: list[str] | None = None
    caption: str | None = None
    sample_steps: int | None = None
    min_snr: float | None = None
    train_text_encoder: bool | None = None
    loss: Literal["dpo", "ipo", "orpo", "kto", "simpo"] | None = None
    beta: float | None = None
    reference: Literal["base", "start"] | None = None
    simpo_gamma: float | None = None
    reward: list[str] | None = None
    reward_weights: list[float] | None = None
    reward_options: dict[str, Any] | None = None
    on_reward_error: Literal["stop", "skip"] | None = None
    num_generations: int | None = None
    max_completion_length: int | None = None
    temperature: float | None = None
    rollouts: Literal["transformers", "engine"] | None = None
    start_adapter: str | None = None
    method: str = "vera"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_norm: Literal["frozen", "train"] | None = None
    lr: float = 1e-2
    find_lr: bool = False
    b_lr: float | None = None
    head_lr: float | None = None
    weight_decay: float = 0.0
    batch_size: int = 16
    group_by_length: bool = False
    packing: bool = False
    padding_free: bool = False
    streaming: bool = False
    num_workers: int = 0
    gradient_accumulation_steps: int = 1
    epochs: float = 3.0
    max_steps: int = 0
    warmup_ratio: float = 0.06
    warmup_steps: int = 0
    lr_scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    ema: float = 0.0
    max_grad_norm: float = 1.0
    keep: Literal["best", "last"] | None = None
    patience: int = 0
    seed: int = 0
    basis_seed: int = 0
    label_smoothing: float = 0.0
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: Attention | None = None
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    quantize: Literal["4bit", "8bit"] | None = None
    gradient_checkpointing: bool = False
    save_steps: int = 0
    report_to: list[str] = dataclasses.field(default_factory=list)
    resume: bool = False
    preview: int = 1
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        for field, least in (
            ("lr", 0),
            ("b_lr", 0),
            ("head_lr", 0),
            ("weight_decay", 0),
            ("max_grad_norm", 0),
            ("epochs", 0),
        ):
            value = getattr(self, field)
            if value is None:
                continue
            if not math.isfinite(value) or value < least:
                raise ConfigError(
                    f"{field} is {value}; it must be a finite number of at least {least}"
                )
        for field, least in (
            ("batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("max_steps", 0),
            ("patience", 0),
            ("save_steps", 0),
            ("preview", 0),
            ("warmup_steps", 0),
            ("num_workers", 0),
        ):
            if getattr(self, field) < least:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least {least}")
        if self.packing and self.padding_free:
            raise ConfigError("packing leaves no padding to be free of; leave out padding_free")
        if self.group_by_length and (self.packing or self.padding_free):
            raise ConfigError(
                "group_by_length saves padding, which packing does better; leave one of them out"
            )
        self._check_streaming()
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; it is a decay, in [0, 1)")
        if self.ema and self.keep == "best":
            raise ConfigError(
                "ema keeps an average of all steps, keep='best' one of them; set keep to last"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(
                f"warmup_ratio is {self.warmup_ratio}; it is a share of all steps, in [0, 1). "
                "For a number of steps use warmup_steps"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"label_smoothing is {self.label_smoothing}; it is a weight, in [0, 1)"
            )
        if self.b_lr is not None and self.method != "vera":
            raise ConfigError(
                f"b_lr is set, but method {self.method!r} has no vectors b; leave it out or use "
                "method vera"
            )
        if self.lr == 0 and self.method != "head":
            raise ConfigError(
                f"lr is 0, with which method {self.method!r} trains nothing beside the head; for "
                "the head alone take method head"
            )
        if self.start_adapter is not None and self.method != "vera":
            raise ConfigError(
                f"start_adapter is set, but method {self.method!r} starts from no adapter; leave "
                "it out or use method vera"
            )
        if self.reference == "start" and self.start_adapter is None:
            raise ConfigError(
                "reference is 'start', but there is no --start-adapter FILE; give one"
            )
        if self.options and self.method in ("vera", "head", "bitfit", "full"):
            raise ConfigError(
                f"options is set to {self.options}, but method {self.method!r} takes none; leave "
                "it out"
            )
        if self.epochs == 0 and self.max_steps == 0:
            raise ConfigError("epochs and max_steps are both 0; one of them says how long to train")

    def _check_streaming(self) -> None:
        """Refuse what needs the whole data set before the first step."""
        if not self.streaming:
            return
        if not self.max_steps:
            raise ConfigError(
                "streaming is set, so the number of examples is unknown; say with max_steps how "
                "long to train"
            )
        for field in ("packing", "group_by_length", "find_lr"):
            if getattr(self, field):
                raise ConfigError(
                    f"{field} needs the whole data set, which streaming does not hold; leave one "
                    "of them out"
                )
        if self.num_workers > 1:
            raise ConfigError(
                f"num_workers is {self.num_workers}, but a stream is read by one process; set it "
                "to 0 or 1"
            )

    def task_settings(self) -> dict[str, Any]:
        """The settings that are a task's own, as far as they are set."""
        return {
            name: getattr(self, name) for name in TASK_SETTINGS if getattr(self, name) is not None
        }

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Range:
    """Values between two bounds; on a logarithmic scale for numbers that are no integers.

    Attributes:
        low: The lowest value.
        high: The highest value.
    """

    low: float
    high: float


TASK_SETTINGS = (
    "max_length",
    "on_overflow",
    "system",
    "train_on",
    "chat_template",
    "prompt",
    "allow_urls",
    "max_seconds",
    "language",
    "image_size",
    "augment",
    "bad_images",
    "bad_boxes",
    "caption",
    "prompts",
    "sample_steps",
    "min_snr",
    "train_text_encoder",
    "loss",
    "beta",
    "reference",
    "simpo_gamma",
    "reward",
    "reward_weights",
    "reward_options",
    "on_reward_error",
    "num_generations",
    "max_completion_length",
    "temperature",
    "rollouts",
)
