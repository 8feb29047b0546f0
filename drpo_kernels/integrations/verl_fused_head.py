"""Importing this puts the fused head in place of verl's: name it in verl's `actor_rollout_ref.model.external_lib`."""

from drpo_kernels.integrations.verl import use_fused_head

use_fused_head()
