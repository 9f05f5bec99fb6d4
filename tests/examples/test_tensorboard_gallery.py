"""The example that draws all that TensorBoard can draw: whatever it writes is read back."""

from __future__ import annotations

import importlib.util
import io
import warnings
from pathlib import Path

import numpy as np
import pytest

GALLERY = Path(__file__).parents[2] / "examples" / "tensorboard_gallery.py"
NUM_EPOCHS, NUM_UPDATES = 2, 90

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run the example, in this process: most of what it imports is here already."""
    spec = importlib.util.spec_from_file_location("tensorboard_gallery", GALLERY)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder = tmp_path_factory.mktemp("runs") / "gallery"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)  # which `add_graph` calls
        example.main(["--epochs", str(NUM_EPOCHS), "--log-dir", str(folder)])
    return folder


def read(folder):
    everything = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    reader = event_accumulator.EventAccumulator(str(folder), size_guidance=everything)
    reader.Reload()
    return reader


@pytest.fixture(scope="module")
def reader(folder):
    return read(folder)


def numbers_in(reader, tag):
    from tensorboard.util import tensor_util

    return [(event.step, tensor_util.make_ndarray(event.tensor_proto)) for event in reader.Tensors(tag)]


def picture_in(encoded):
    from PIL import Image

    return Image.open(io.BytesIO(encoded))


def test_scalars_of_the_run_are_in_it(reader):
    assert [event.step for event in reader.Scalars("train_loss_step")] == list(range(10, NUM_UPDATES + 1, 10))
    losses = [event.value for event in reader.Scalars("eval_loss_epoch")]
    assert len(losses) == NUM_EPOCHS
    assert losses[1] < losses[0]
    assert reader.Scalars("eval_accuracy")[-1].value > 0.5


def test_a_chart_has_several_scalars(folder):
    curves = {
        name: read(folder / f"loss of training and evaluation_{name}").Scalars("loss of training and evaluation")
        for name in ("train", "eval")
    }
    assert {name: [event.step for event in events] for name, events in curves.items()} == {
        "train": [45, 90],
        "eval": [45, 90],
    }


def test_histograms_show_weights_and_gradients(reader):
    tags = reader.Tags()["histograms"]
    assert {"weights/0.weight", "gradients/0.weight", "weights/6.bias", "gradients/6.bias"} <= set(tags)
    (first, *_) = reader.Histograms("weights/0.weight")
    assert (first.step, first.histogram_value.num) == (20, 16 * 9)


@pytest.mark.parametrize(("tag", "size"), [("digits/first", (8, 8)), ("digits/grid", (80, 40))])
def test_images_and_grids_of_images_are_shown(reader, tag, size):
    (image,) = reader.Images(tag)
    assert picture_in(image.encoded_image_string).size == size


def test_a_figure_is_shown_after_each_epoch(reader):
    assert [event.step for event in reader.Images("confusion")] == [45, 90]
    assert picture_in(reader.Images("confusion")[0].encoded_image_string).size == (400, 400)


def test_text_is_shown(reader):
    ((_, text),) = numbers_in(reader, "about/text_summary")
    assert b"**handwritten digits**" in text.item()


def test_audio_is_played(reader):
    import wave

    (sound,) = reader.Audio("loss as a melody")
    with wave.open(io.BytesIO(sound.encoded_audio_string)) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, NUM_EPOCHS * 2000)
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    assert 0.4 < samples.max() / 2**15 <= 0.5


def test_a_video_has_a_frame_for_each_epoch(reader):
    (video,) = reader.Images("filters")
    picture = picture_in(video.encoded_image_string)
    assert (picture.format, picture.n_frames) == ("GIF", NUM_EPOCHS)


def test_a_mesh_is_shown(reader):
    tags = [tag for tag in reader.Tags()["tensors"] if tag.startswith("digits/mean of the zeros_")]
    shapes = {tag.rpartition("_")[2]: numbers_in(reader, tag)[0][1].shape for tag in tags}
    assert shapes == {"VERTEX": (1, 64, 3), "COLOR": (1, 64, 3), "FACE": (1, 2 * 7 * 7, 3)}


def test_the_graph_of_the_model_is_shown(reader):
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    graph = GraphDef.FromString(reader.Graph().SerializeToString())
    assert {"aten::_convolution", "aten::linear"} <= {node.op for node in graph.node}


def test_curves_of_precision_and_recall_are_shown(reader):
    curves = numbers_in(reader, "precision and recall/0")
    assert [step for step, _ in curves] == [45, 90]
    true_positives, false_positives, *_, precision, recall = curves[-1][1]
    assert recall[0] == pytest.approx(1.0)
    np.testing.assert_allclose(precision[0], true_positives[0] / (true_positives[0] + false_positives[0]), rtol=1e-5)


def test_an_embedding_has_labels_and_images(folder):
    config = (folder / "projector_config.pbtxt").read_text()
    assert config.count("embeddings {") == NUM_EPOCHS
    points = folder / f"{NUM_UPDATES:05}" / "outputs"
    assert np.loadtxt(points / "tensors.tsv").shape == (100, 10)
    assert len((points / "metadata.tsv").read_text().split()) == 100
    assert picture_in((points / "sprite.png").read_bytes()).size == (80, 80)


def test_hyperparameters_and_what_they_led_to_are_in_a_table(reader):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hyperparameters = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hyperparameters["lr"].number_value == 0.005
    assert hyperparameters["train_per_device_batch_size"].number_value == 32
    assert reader.Scalars("eval_accuracy"), "in the same run, so that they are in the row of the table"
