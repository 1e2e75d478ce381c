"""StudentTeacherTrainer: order of the steps, teacher update, modes, resuming, and that the loss is learned."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointLoader, CheckpointSaver, from_engine
from monai.losses import DiceCELoss
from torch import Tensor, nn

from monai_petl.engines import PrepareViews, StudentTeacherTrainer, make_teacher
from monai_petl.handlers import GradientClipping
from monai_petl.losses import CPALoss, SampleWeightedFocalLoss
from tests.parity_cases import check, load_cases, load_expected, tensors

CLASSES = ["liver", "spleen"]


class Output(NamedTuple):
    logits: Tensor
    embedding: Tensor


class TinyNetwork(nn.Module):
    """Stands in for a promptable network: half-size embedding, batch norm, one token a class, two logits."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, channels, (3, 3, 1), stride=(2, 2, 1), padding=(1, 1, 0))
        self.norm = nn.BatchNorm3d(channels)
        self.mix = nn.Conv3d(channels, channels, (3, 3, 1), padding=(1, 1, 0))
        self.tokens = nn.ParameterDict({name: nn.Parameter(torch.randn(channels)) for name in CLASSES})
        self.head = nn.Conv3d(channels, 2, 1)
        self.calls: list[list[str] | None] = []

    def forward(self, image: Tensor, classes: list[str] | None = None) -> Output:
        self.calls.append(classes)
        embedding = self.norm(self.conv(image)).relu()
        if classes is not None:
            embedding = embedding + torch.stack([self.tokens[name] for name in classes])[..., None, None, None]
        embedding = self.mix(embedding)
        logits = nn.functional.interpolate(self.head(embedding), scale_factor=(2, 2, 1), mode="trilinear")
        return Output(logits, embedding)


def view(size: int, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
    image = nn.functional.interpolate(
        torch.randn(batch, 1, size // 4, size // 4, 1, generator=generator), (size, size, 1), mode="trilinear"
    )
    axis = torch.arange(size) - (size - 1) / 2
    coords = torch.stack([*torch.meshgrid(axis, axis, torch.zeros(1), indexing="ij")])
    return {"image": image, "label": (image > 0).to(torch.uint8), "coords": coords.expand(batch, -1, -1, -1, -1)}


def batches(count: int = 3, sizes: tuple[int, ...] = (32, 24), batch: int = 2, seed: int = 0) -> list[dict]:
    """Collated batches as the view transform and a loader make them; students are central crops of the teacher view."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        teacher = view(40, generator, batch)
        data = {"teacher_image": teacher["image"], "teacher_coords": teacher["coords"], "class_name": CLASSES}
        for index, size in enumerate(sizes):
            margin = (40 - size) // 2
            for name, volume in teacher.items():
                cropped = volume[:, :, margin : 40 - margin, margin : 40 - margin]
                noise = 0.1 * torch.randn(cropped.shape, generator=generator) if name == "image" else 0
                data[f"student{index}_{name}"] = cropped + noise
        result.append(data)
    return result


def trainer(
    network: nn.Module, data: list[dict], epochs: int = 1, lr: float = 0.01, **options
) -> StudentTeacherTrainer:
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    return StudentTeacherTrainer("cpu", epochs, data, network, optimizer, **options)


def network(seed: int = 0) -> TinyNetwork:
    torch.manual_seed(seed)
    return TinyNetwork()


def test_matches_the_published_teacher_update():
    (case,) = load_cases("cpa", kind="ema")
    expected, values = load_expected("cpa"), tensors(case, "ema_three_updates.")

    def module(prefix: str) -> nn.Module:
        result = nn.Module()
        for name, value in values.items():
            owner, _, rest = name.partition(".")
            if owner == prefix and rest != "norm.running_mean":
                result.register_parameter(rest.replace(".", "_"), nn.Parameter(value))
        result.register_buffer("running_mean", values[f"{prefix}.norm.running_mean"] if prefix == "teacher" else None)
        return result

    teacher = module("teacher").requires_grad_(False)
    for update in range(case["config"]["updates"]):
        student = module(f"student{update}")
        engine = trainer(student, [], teacher=teacher, momentum=case["config"]["tau"], epoch_length=1)
        engine.update_teacher()
        for name in ("conv.weight", "prompt.tokens", "norm.weight"):
            check(expected, case, f"after_update{update + 1}.{name}", teacher.get_parameter(name.replace(".", "_")))
        check(expected, case, f"after_update{update + 1}.norm.running_mean", teacher.get_buffer("running_mean"))


def test_teacher_follows_the_student_one_step_behind():
    student = network()
    engine = trainer(student, batches(2))
    start = deepcopy(dict(engine.teacher.named_parameters()))
    after_first_step = {}

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    def remember() -> None:
        after_first_step.update(deepcopy(dict(student.named_parameters())))
        for name, parameter in engine.teacher.named_parameters():  # student and teacher were equal
            torch.testing.assert_close(parameter, start[name], rtol=0, atol=1e-7)

    engine.run()
    for name, parameter in engine.teacher.named_parameters():
        torch.testing.assert_close(parameter, 0.99 * start[name] + 0.01 * after_first_step[name].detach())
        assert parameter.grad is None


def test_full_momentum_keeps_the_teacher():
    engine = trainer(network(), batches(3), momentum=1.0)
    start = deepcopy(dict(engine.teacher.named_parameters()))
    engine.run()
    assert all(torch.equal(parameter, start[name]) for name, parameter in engine.teacher.named_parameters())


def test_teacher_has_batch_statistics_of_its_own():
    student = network()
    engine = trainer(student, batches(1))
    engine.run()
    assert student.norm.num_batches_tracked == 2
    assert engine.teacher.norm.num_batches_tracked == 1
    assert not torch.equal(student.norm.running_mean, engine.teacher.norm.running_mean)


@pytest.mark.parametrize(
    ("mode", "terms", "teacher_calls"),
    [
        ("self", {"cpa_loss"}, 1),
        ("segmentation", {"segmentation_loss"}, 0),
        ("both", {"cpa_loss", "segmentation_loss"}, 1),
    ],
)
def test_modes_run_what_they_need(mode, terms, teacher_calls):
    data = batches(1)
    for key in [key for key in data[0] if mode == "self" and key.endswith("label")]:
        del data[0][key]
    for key in [key for key in data[0] if mode == "segmentation" and key.startswith("teacher")]:
        del data[0][key]
    student = network()
    engine = trainer(student, data, mode=mode)
    engine.run()
    output = engine.state.output
    assert {name for name in ("cpa_loss", "segmentation_loss") if name in output} == terms
    torch.testing.assert_close(output["loss"].detach(), sum(output[name] for name in terms))
    for name in terms:
        torch.testing.assert_close(output[name], output[f"{name}_student0"] + output[f"{name}_student1"])
    assert student.calls == [CLASSES, CLASSES]
    assert engine.teacher.calls == [CLASSES] * teacher_calls


def test_networks_run_without_prompts_when_the_batch_names_no_class():
    data = batches(1)
    del data[0]["class_name"]
    student = network()
    engine = trainer(student, data, mode="self")
    engine.run()
    assert student.calls == [None, None]
    assert engine.teacher.calls == [None]


def test_events_come_in_the_order_of_monai():
    engine = trainer(network(), batches(1))
    fired = []
    for event in IterationEvents:
        if event != IterationEvents.INNER_ITERATION_STARTED and event != IterationEvents.INNER_ITERATION_COMPLETED:
            engine.add_event_handler(
                event, lambda engine, event: fired.append((event, set(engine.state.output))), event
            )
    engine.run()
    assert [event for event, _ in fired] == [
        IterationEvents.FORWARD_COMPLETED,
        IterationEvents.LOSS_COMPLETED,
        IterationEvents.BACKWARD_COMPLETED,
        IterationEvents.MODEL_COMPLETED,
    ]
    assert "pred" in fired[0][1]
    assert {"loss", "cpa_loss", "segmentation_loss", "cpa_kept"} <= fired[1][1]


def test_terms_can_be_logged():
    engine = trainer(network(), batches(1))
    logged = {}
    transform = from_engine(["loss", "cpa_loss", "segmentation_loss_student1"])

    @engine.on(Events.ITERATION_COMPLETED)
    def log() -> None:
        logged["values"] = [value.item() for value in transform(engine.state.output)]

    engine.run()
    assert len(logged["values"]) == 3


def test_class_weights_and_annotations_reach_the_segmentation_loss():
    data = batches(1)
    data[0]["annotated"] = torch.tensor([True, False])
    weights = {"liver": 0.5, "spleen": 3.0}
    student = network()
    engine = trainer(student, data, mode="segmentation", additive_class_weights=weights)
    engine.run()
    logits = network()(data[0]["student0_image"], CLASSES).logits
    expected = SampleWeightedFocalLoss(weight=[1.0, 1.5])(logits[:1], data[0]["student0_label"][:1])
    torch.testing.assert_close(engine.state.output["segmentation_loss_student0"], expected.detach())


def test_samples_without_a_label_are_left_out_with_any_loss():
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    data = batches(1)
    logits = network()(data[0]["student0_image"], CLASSES).logits
    for annotated, expected in (
        ([False, True], loss(logits[1:], data[0]["student0_label"][1:])),
        ([False, False], torch.tensor(0.0)),
    ):
        data[0]["annotated"] = torch.tensor(annotated)
        engine = trainer(network(), data, mode="segmentation", segmentation_loss=loss)
        engine.run()
        torch.testing.assert_close(engine.state.output["segmentation_loss_student0"], expected.detach())


def test_class_weights_need_a_loss_that_takes_them():
    with pytest.raises(ValueError, match=r"argument `weight`.*DiceCELoss has none"):
        trainer(network(), batches(1), segmentation_loss=DiceCELoss(), additive_class_weights={"liver": 1.0})


def test_a_plain_loss_can_be_used():
    class Plain(nn.Module):
        def forward(self, logits: Tensor, label: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits, label[:, 0].long())

    engine = trainer(network(), batches(1), segmentation_loss=Plain())
    engine.run()
    assert engine.state.output["segmentation_loss"] > 0


def test_resumed_run_continues_as_if_never_stopped(tmp_path):
    data = batches(4)

    def run(epochs: int, folder=None, checkpoint=None) -> StudentTeacherTrainer:
        student = network()
        teacher = make_teacher(student)
        engine = trainer(student, data, epochs, teacher=teacher)
        parts = {"net": student, "teacher": teacher, "optimizer": engine.optimizer, "trainer": engine}
        if checkpoint is not None:
            CheckpointLoader(str(checkpoint), parts, strict=True).attach(engine)
        if folder is not None:
            CheckpointSaver(str(folder), parts, save_final=True, final_filename="final.pt").attach(engine)
        # the jitter is drawn from torch's generator
        engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: torch.manual_seed(engine.state.epoch))
        engine.run()
        return engine

    whole = run(epochs=2)
    run(epochs=1, folder=tmp_path)
    resumed = run(epochs=2, checkpoint=tmp_path / "final.pt")
    assert resumed.state.iteration == whole.state.iteration == 8
    for a, b in ((whole.network, resumed.network), (whole.teacher, resumed.teacher)):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name


def test_cpa_is_learned_without_collapse():
    data = batches(1, batch=2)
    student = network()
    loss = CPALoss(fwhm=32.0)
    engine = trainer(student, data * 50, mode="self", cpa_loss=loss, lr=0.003, train_handlers=[GradientClipping(1.0)])
    history, spread = [], []

    @engine.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        history.append(engine.state.output["cpa_loss"].item())
        embedding = nn.functional.normalize(engine.state.output["pred"].students[0].embedding, dim=1)
        spread.append(embedding.flatten(2).std(dim=-1).mean().item())

    engine.run()
    assert sum(history[-5:]) < 0.9 * sum(history[:5])
    assert min(spread) > 0.05


def test_segmentation_is_learned():
    engine = trainer(network(), batches(1) * 40, mode="both")
    history = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: history.append(engine.state.output["segmentation_loss"].item())
    )
    engine.run()
    assert history[-1] < 0.5 * history[0]


def test_teacher_of_a_wrapped_network_is_the_bare_network():
    student = network()
    teacher = make_teacher(nn.DataParallel(student))
    assert isinstance(teacher, TinyNetwork)
    assert teacher is not student
    assert teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    engine = trainer(nn.DataParallel(student), batches(1), teacher=teacher)
    engine.run()
    assert "teacher" in Checkpoint({"teacher": engine.teacher}, lambda checkpoint, name: None).to_save


def test_wrong_arguments_are_explained():
    with pytest.raises(ValueError, match="mode must be"):
        trainer(network(), [], mode="all")
    with pytest.raises(ValueError, match="momentum must be"):
        trainer(network(), [], momentum=1.5)
    with pytest.raises(KeyError, match="no student0_image"):
        PrepareViews()({"image": torch.zeros(1)})


def run_batch(without: str, **options) -> None:
    data = {key: value for key, value in batches(1)[0].items() if without not in key}
    trainer(network(), [data], **options).run()


def test_missing_data_are_explained():
    with pytest.raises(ValueError, match="needs student0_label"):
        run_batch("label")
    with pytest.raises(ValueError, match="needs teacher_image"):
        run_batch("teacher")
    with pytest.raises(ValueError, match="additive_class_weights are for"):
        run_batch("nothing", additive_class_weights={"liver": 1.0})


def test_network_without_embedding_is_refused():
    class Plain(TinyNetwork):
        def forward(self, image: Tensor, classes: list[str] | None = None) -> Tensor:
            return super().forward(image, classes).logits

    with pytest.raises(TypeError, match="got Tensor for classes"):
        trainer(Plain(), batches(1)).run()


def test_teacher_has_to_fit_the_student():
    student = network()
    engine = trainer(student, batches(1), teacher=make_teacher(student))
    student.tokens["kidney"] = nn.Parameter(torch.zeros(8))
    with pytest.raises(ValueError, match="after adding classes"):
        engine.run()
