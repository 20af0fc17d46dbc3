from quantkit.runtime.llm import LLM as LLM
from quantkit.runtime.llm import Generated as Generated
from quantkit.runtime.params import SamplingParams as SamplingParams

__version__: str
