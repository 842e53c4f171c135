"""Print the parameters of every named configuration, built on the meta device."""

from lasp.hybrid import NAMED_CONFIGS, count_parameters

for name, config in NAMED_CONFIGS.items():
    total, active = count_parameters(config)
    print(
        f"{name}: {total / 1e9:.1f} B total, {active / 1e9:.1f} B active parameters"
        " (embedding and head not counted as active)"
    )
