"""What the configurations of the published sizes share: groups of parameters and mixtures.

Paths are relative to the folder that the command is run in, the repository's; those inside a mixture to the mixture's.
"""

from train.config import GroupConfig

CAPTIONS = "configs/mixtures/llava_558k.yaml"
INSTRUCTIONS = "configs/mixtures/llava_665k.yaml"
INSTRUCTIONS_AND_VIDEOS = "configs/mixtures/llava_665k_video_100k.yaml"

PROJECTOR = r"mm_projector/.*"
DECODER = r"(embed_tokens|layers|norm|lm_head)/.*"
ADDED = r"prefusion_layers/.*|compressor/(?!pos_embed$).*"  # in stage 2
CONSTANT = r"vision_tower/.*|compressor/pos_embed"  # frozen in both stages

STAGE_1 = (GroupConfig(PROJECTOR, learning_rate=1e-3), GroupConfig(r"(?!mm_projector/).*"))
STAGE_2 = (
    GroupConfig(PROJECTOR, learning_rate=1e-5),
    GroupConfig(f"{DECODER}|{ADDED}", learning_rate=1e-4),
    GroupConfig(CONSTANT),
)
STAGE_2_LORA = (
    GroupConfig(PROJECTOR, learning_rate=2e-5),
    GroupConfig(ADDED, learning_rate=1e-4),
    GroupConfig(r"layers/.*/lora_[ab]", learning_rate=2e-4),
    GroupConfig(rf"(?!.*/lora_[ab]$)({DECODER}|{CONSTANT})"),
)
