"""Print every named model and its parameters, built on the meta device."""

from lasp.hybrid import NAMED_CONFIGS, count_parameters

ROW = "{:24} {:>6} {:>9} {:>7} {:>7} {:>10} {:>10} {:>10}"

if __name__ == "__main__":
    print(
        ROW.format(
            "model", "layers", "lightning", "hidden", "experts", "total", "active", "+ vocab"
        )
    )
    for name, config in NAMED_CONFIGS.items():
        count = count_parameters(config)
        sizes = (f"{number / 1e9:.2f} B" for number in count)
        experts = config.moe.num_experts if config.moe else 0
        lightning = config.kinds.count("G")
        print(ROW.format(name, config.num_layers, lightning, config.hidden_size, experts, *sizes))
    print("active: parameters that one token meets, without embedding and head; + vocab: with them")
