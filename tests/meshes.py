"""All meshes of up to eight devices, as sizes of the axes data, fsdp and tensor."""

import itertools

MESHES = [(d, f, t) for d, f, t in itertools.product((1, 2, 4, 8), repeat=3) if d * f * t <= 8]
