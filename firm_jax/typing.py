"""Shapes in annotations, as jaxtyping writes them: `Float[Array, "B S D"]`.

Nothing is checked while a program runs. Machines that have JAX but not jaxtyping get names that bear a shape and say
nothing, so that networks can be measured there.
"""

try:
    from jaxtyping import Array, Bool, Float, Int, Int8, PRNGKeyArray
except ModuleNotFoundError:
    from jax import Array

    class _Shaped:
        def __class_getitem__(cls, _):
            return Array

    Bool = Float = Int = Int8 = _Shaped
    PRNGKeyArray = Array

__all__ = ["Array", "Bool", "Float", "Int", "Int8", "PRNGKeyArray"]
