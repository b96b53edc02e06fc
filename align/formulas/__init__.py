"""The mathematics of the method: pure functions of tensors and numbers, without configuration, state or logging."""
