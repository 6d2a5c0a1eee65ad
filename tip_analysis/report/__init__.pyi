from .build import build_report as build_report
from .build import write_report as write_report
