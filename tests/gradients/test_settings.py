"""What is measured of gradients: wrong choices are refused."""

import pytest

from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.names import Loss, Method
from tip_analysis.gradients.settings import GradientSettings


def test_settings_are_checked() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown method .probes.*probe, exact"):
        GradientSettings(method="probes")
    with pytest.raises(UnknownNameError, match="unknown loss aggregation 'tokens'"):
        GradientSettings(loss_aggregation="tokens")
    with pytest.raises(UnknownNameError, match="unknown loss 'kl'"):
        GradientSettings(losses=("kl",))
    texts = GradientSettings(losses=("jsd",), method="exact", loss_aggregation="token")
    assert texts == GradientSettings((Loss.JSD,), method=Method.EXACT, loss_aggregation="token")
    assert texts.method is Method.EXACT
    with pytest.raises(OptionError, match="at least 1"):
        GradientSettings(num_probes=0)
    with pytest.raises(OptionError, match="different names"):
        GradientSettings(losses=("jsd", "jsd"))
