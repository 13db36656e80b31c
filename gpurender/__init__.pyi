from .audio import Features, load_features
from .audio_engine import load_audio_engine
from .choose_engine import load_engine
from .color import nv12_to_rgb, rgb_to_nv12
from .compare.comparison import Comparison
from .compare.likeness import Figures, compare_pictures
from .compare.run import compare_frames
from .coreml import export_coreml
from .crop import crop_and_mask, crop_faces, face_input
from .encode import write_frames
from .engine import Engine, Probe, predict
from .errors import DeviceError, InputError, OutputError
from .export import export_onnx
from .features import make_features, write_features
from .find import find_audio_encoder, find_network, find_sound, find_template
from .network import AudioEncoder, UNet, load_audio_encoder, load_unet
from .pack import pack_template
from .paste import paste_faces, paste_faces_nv12
from .pipeline import FrameGenerationPipeline
from .reference import write_reference
from .reference_set import ReferenceSet, open_reference
from .render import make, probe_inputs, render
from .report import Summary
from .template import Template, frame_order, open_template
from .timings import Timings

__all__ = [
    "AudioEncoder",
    "Comparison",
    "DeviceError",
    "Engine",
    "Features",
    "Figures",
    "FrameGenerationPipeline",
    "InputError",
    "OutputError",
    "Probe",
    "ReferenceSet",
    "Summary",
    "Template",
    "Timings",
    "UNet",
    "compare_frames",
    "compare_pictures",
    "crop_and_mask",
    "crop_faces",
    "export_coreml",
    "export_onnx",
    "face_input",
    "find_audio_encoder",
    "find_network",
    "find_sound",
    "find_template",
    "frame_order",
    "load_audio_encoder",
    "load_audio_engine",
    "load_engine",
    "load_features",
    "load_unet",
    "make",
    "make_features",
    "nv12_to_rgb",
    "open_reference",
    "open_template",
    "pack_template",
    "paste_faces",
    "paste_faces_nv12",
    "predict",
    "probe_inputs",
    "render",
    "rgb_to_nv12",
    "write_features",
    "write_frames",
    "write_reference",
]
