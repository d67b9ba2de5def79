"""All routes of Tinker's API."""

from toolkit.live import LiveTraining
from toolkit.serving.generation import Generation
from toolkit.serving.tinker.archive import add_archive_routes
from toolkit.serving.tinker.messages import messages
from toolkit.serving.tinker.results import recover_promises
from toolkit.serving.tinker.sampling import add_sampling_routes
from toolkit.serving.tinker.sessions import ROOT, Tinker, add_session_routes, tinker_error
from toolkit.serving.tinker.training import add_training_routes


def add_routes(generation: Generation, live: LiveTraining) -> None:
    """Add them to the application of ``generation``. Raises ToolkitError where the client is not installed."""
    messages()
    tinker = Tinker(generation, live)
    add_session_routes(tinker, recover_promises)
    add_training_routes(tinker)
    add_sampling_routes(tinker)
    add_archive_routes(tinker)
    generation.base.add_error_style(ROOT, tinker_error)
