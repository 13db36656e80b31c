"""The facade that other implementations of SyncTalk_2D have: one object for a network, one call for a video."""

from pathlib import Path

from .audio import FEATURE_FILES, load_features
from .errors import InputError, check_choice
from .find import check_network_file, find_sound
from .network import WINDOW_SHAPES, Mode
from .progress import Progress
from .reference import write_reference
from .reference_set import ReferenceSet
from .render import make


class FrameGenerationPipeline:
    """A trained network, ready to render.

    Example:
        pipeline = FrameGenerationPipeline(checkpoint_path="checkpoint/anna/195.pth", mode="ave")
        pipeline.generate_video(
            audio_features_path="aud_ave.npy",
            template_dir="dataset/anna",
            audio_path="speech.wav",
            output_path="anna.mp4",
        )
    """

    def __init__(self, checkpoint_path: str | Path, mode: Mode = "ave", device: str | None = None) -> None:
        """
        Args:
            checkpoint_path: `.pth` or `.onnx`, see `load_engine`.
            mode: the kind of features that it was trained on: `ave`, `hubert` or `wenet`.
            device: see `load_engine`; None is `auto`.

        Raises:
            InputError: there is no such file or mode.
        """
        self.checkpoint = Path(checkpoint_path)
        self.mode: Mode = mode
        self.device = device or "auto"
        check_choice("kind of features", mode, WINDOW_SHAPES)
        check_network_file(self.checkpoint)

    def generate_video(
        self,
        audio_features_path: str | Path,
        template_dir: str | Path,
        audio_path: str | Path | None,
        output_path: str | Path,
        *,
        start_frame: int = 0,
        fps: float | None = None,
        use_parsing: bool = False,
        crf: int | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> str:
        """Render a video of what some features say; see `make`, which has more to choose from.

        Args:
            audio_features_path: a feature file, see `load_features`; or sound, if the template has an audio encoder.
            template_dir: see `open_template`.
            audio_path: what is heard in the video; None is `audio_features_path` if that is sound, else nothing.
            output_path: see `write_frames`.
            start_frame: template frames to skip at the beginning.
            fps: None is the rate that the mode was trained at: 25, or 20 for `wenet`.
            use_parsing: keep the template's pixels where its parsing masks say so.
            crf: constant quality, lower is better; None is visually lossless.
            overwrite: replace what is at `output_path`.
            progress: is told about stages and frames.

        Returns:
            `output_path`.

        Raises:
            InputError, DeviceError, OutputError: see `make`; also for features of another mode.
        """
        self._check_features(audio_features_path)
        make(
            template_dir,
            audio_features_path,
            output_path,
            model=self.checkpoint,
            sound=audio_path,
            device=self.device,
            fps=fps,
            start_frame=start_frame,
            parsing=use_parsing,
            quality=crf,
            overwrite=overwrite,
            progress=progress,
        )
        return str(output_path)

    def generate_reference_outputs(
        self,
        audio_features_path: str | Path,
        template_dir: str | Path,
        output_dir: str | Path,
        num_sample_frames: int = 5,
        *,
        overwrite: bool = False,
    ) -> ReferenceSet:
        """Write sample frames and the numbers behind them, for other implementations to be held against.

        Args:
            audio_features_path, template_dir: see `generate_video`.
            output_dir, num_sample_frames, overwrite: see `write_reference`.

        Raises:
            InputError, DeviceError, OutputError: see `write_reference`; also for features of another mode.
        """
        self._check_features(audio_features_path)
        return write_reference(
            template_dir,
            audio_features_path,
            output_dir,
            frames=num_sample_frames,
            model=self.checkpoint,
            device=self.device,
            parsing=False,
            overwrite=overwrite,
        )

    def _check_features(self, path: str | Path) -> None:
        stored = find_sound(path).suffix.lower() in FEATURE_FILES
        mode = load_features(path).mode if stored else "ave"
        if mode != self.mode:
            raise InputError(f"{path} holds {mode} features, but the pipeline was made for {self.mode}.")
