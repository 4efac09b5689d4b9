"""A perimeter's machines, network and bucket at Google: planned from the live state, made, taken away."""
