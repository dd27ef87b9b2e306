"""A GPU that is not there: tensors that say they are on one and compute on the CPU, checked as a GPU would.

* `form.py` makes the device exist, in one of two forms: `pure`, a device `pretend:0` through PyTorch's
  PrivateUse1, which needs no compiler; and `cuda`, a device `cuda:0`, for which `guard.cpp` is built once, so
  that branches on the type `cuda` run too. A third form, `card`, is a real card, on which the same is run.
* `tensor.py` is the tensor, and what runs its operators.
* `rules.py` says what a GPU does not let pass.
* `cuda.py` takes the place of `torch.cuda`, with an allocator that counts and can run out.
* `rehearse.py` runs the product on it, in a process of its own: a form is chosen before torch is imported;
  `process.py` starts it, `scenario.py` says what is run and what came of it.
* `shortage.py` runs an engine with less memory than it takes; `paths.py` takes every family along every path.

What it cannot tell: how exact and how fast a GPU's kernels are, and what its streams race for.
"""
