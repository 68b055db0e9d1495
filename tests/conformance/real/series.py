"""Models of time series and of trajectories."""

from __future__ import annotations

from typing import Any

import torch

from conformance.drawing import constant, draw, integers, normal, of
from conformance.real.building import MASK, architecture

SERIES: dict[str, Any] = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
    "num_static_categorical_features": 0,
    "num_static_real_features": 0,
    "input_size": 1,
    "num_parallel_samples": 2,
    "cardinality": [0],
    "embedding_dimension": [0],
}
HISTORY = draw(
    past_values=normal("B", 10),
    past_time_features=normal("B", 10, 2),
    past_observed_mask=of(lambda t: (t > -1).float(), normal("B", 10)),
    future_values=normal("B", 4),
    future_time_features=normal("B", 4, 2),
    use_cache=constant(False),
)
architecture(
    "time-series", "time_series_transformer", "TimeSeriesTransformerModel", HISTORY, config=SERIES
)
architecture("time-series", "informer", "InformerModel", HISTORY, "random", config=SERIES)
architecture(
    "time-series",
    "autoformer",
    "AutoformerModel",
    HISTORY,
    config={
        **SERIES,
        "moving_average": 3,
        "label_length": 2,
    },
)
architecture(
    "time-series",
    "patchtst",
    "PatchTSTForPrediction",
    draw(past_values=normal("B", 16, 2)),
    config={
        "context_length": 16,
        "patch_length": 4,
        "patch_stride": 4,
        "num_input_channels": 2,
        "prediction_length": 4,
    },
)
architecture(
    "time-series",
    "patchtsmixer",
    "PatchTSMixerForPrediction",
    draw(
        past_values=normal("B", 16, 2),
    ),
    config={
        "context_length": 16,
        "patch_length": 4,
        "patch_stride": 4,
        "num_input_channels": 2,
        "prediction_length": 4,
    },
)
architecture(
    "time-series",
    "timesfm",
    "TimesFmModel",
    draw(
        past_values=normal("B", 32),
        past_values_padding=of(lambda t: (t > 1).long(), normal("B", 32)),
        freq=integers(0, 3, "B", 1),
    ),
    config={"patch_length": 8, "context_length": 32, "horizon_length": 8},
)
architecture(
    "time-series",
    "decision_transformer",
    "DecisionTransformerModel",
    draw(
        states=normal("B", "L", 5),
        actions=normal("B", "L", 3),
        rewards=normal("B", "L", 1),
        returns_to_go=normal("B", "L", 1),
        timesteps=lambda b, n: torch.arange(n).expand(b, n).contiguous(),
        attention_mask=MASK,
    ),
    config={"state_dim": 5, "act_dim": 3, "max_ep_len": 32},
    lengths=(4, 9),
)
