"""What a run writes down, readable without torch.

`folder` names the files of a run's folder, `recorder` writes metrics and TensorBoard events as the run goes on, `rates`
reads them: tokens a second, bytes, and whether the emulated network kept its rates.
"""
