"""The progress bar of a long run."""

from tqdm import tqdm


class Progress(tqdm):
    """This bar vanishes at its end. TQDM_DISABLE in the environment keeps it away."""

    say, advance = tqdm.set_description, tqdm.update

    def __init__(self, total: int):
        super().__init__(total=total, leave=False)
