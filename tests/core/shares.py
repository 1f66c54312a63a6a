"""How a tensor comes to have the values of another, and perhaps its memory."""

import copy
import io

import torch


def assign_slice(cache, template):
    cache[:] = template
    return cache


def load(cache, template):
    module = torch.nn.Module()
    module.register_buffer("cache", cache)
    module.load_state_dict({"cache": template})
    return module.cache


def pickled(t):
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file)


# How a tensor comes to have the values of another: (old, source) -> new.
WAYS = {
    "copy_": lambda cache, template: cache.copy_(template),
    "slice": assign_slice,
    "load_state_dict": load,
    "data.copy_": lambda cache, template: (cache.data.copy_(template), cache)[1],
    "clone": lambda cache, template: template.clone(),
    "deepcopy": lambda cache, template: copy.deepcopy(template),
    "to": lambda cache, template: template.to(template.device, copy=True),
    "empty_like": lambda cache, template: torch.empty_like(template).copy_(template),
    "detach": lambda cache, template: cache.copy_(template.detach()),
}
# And by way of another copy, or of a file.
COPIES = WAYS | {
    "pickle": lambda cache, template: pickled(template),
    "detach.clone": lambda cache, template: template.detach().clone(),
    "data.clone": lambda cache, template: template.data.clone(),
    "load_state_dict of a deepcopy": lambda cache, template: load(
        cache, copy.deepcopy(template)
    ),
}
