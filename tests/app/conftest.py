from expert_models import models  # noqa: F401
