"""A stand-in for a checkout of DeepPlanning with the same files, names and shapes: two cities,
three trains, one shop. Written from the benchmark's interfaces; none of its text or code."""

import json
from pathlib import Path

TRAVEL_AGENT = """
import json, sys
from pathlib import Path
from .call_llm import call_llm

class ToolsFnAgent:
    def __init__(self, model, sample_id=None, database_base_path=None, language="zh"):
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from tools.base_travel_tool import BaseTravelTool
        import tools
        place = Path(database_base_path) / f"id_{sample_id}" / "trains" / "trains.csv"
        cfg = {"language": language, "database_path": str(place)}
        self.tool_instances = {cls.name: cls(cfg) for cls in BaseTravelTool.__subclasses__()}
        print("noise on stdout")

    def _exec_tool(self, name, arguments_json):
        tool = self.tool_instances.get(name)
        if not tool:
            return json.dumps({"error": f"tool '{name}' not found"})
        try:
            return tool.call(json.loads(arguments_json))
        except Exception as problem:
            return json.dumps({"error": str(problem)})

    def _extract_plan_content(self, text):
        begin, end = text.find("<plan>"), text.find("</plan>")
        return text[begin + 6 : end].strip() if 0 <= begin < end else ""
"""
TRAVEL_BASE = """
class BaseTravelTool:
    def __init__(self, cfg=None):
        self.cfg = cfg or {}
"""
TRAIN_TOOL = """
import csv, json, time
from .base_travel_tool import BaseTravelTool

class TrainQueryTool(BaseTravelTool):
    name = "query_train_info"
    def call(self, params):
        print("more noise")
        if params["origin"] == "Nowhere":
            time.sleep(60)
        if params["origin"] == "Void":
            import os
            os._exit(3)
        with open(self.cfg["database_path"], encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["origin_city"] == params["origin"]]
        return json.dumps(rows)
"""
CONVERT = """
import json
def convert_reports(result_dir, language="zh", workers=10, skip_existing=False, verbose=False):
    (result_dir / "converted_plans").mkdir(exist_ok=True)
    for report in (result_dir / "reports").glob("id_*.txt"):
        plan = json.dumps({"text": report.read_text(), "language": language})
        place = result_dir / "converted_plans" / f"{report.stem}_converted.json"
        place.write_text(plan)
"""
EVALUATE = """
import json
def evaluate_plans(result_dir, test_data_path, database_dir, workers=10, verbose=False):
    (result_dir / "evaluation").mkdir(exist_ok=True)
    samples = {one["id"]: one for one in json.loads(test_data_path.read_text())}
    for file in (result_dir / "converted_plans").glob("id_*_converted.json"):
        sample = file.stem.split("_")[1]
        plan = json.loads(file.read_text())
        hard = float(samples[sample]["meta_info"]["train"] in plan["text"])
        there = float((database_dir / f"id_{sample}").is_dir())
        scores = {"commonsense_weighted_score": there, "personalized_score": hard,
                  "composite_score": (there + hard) / 2, "case_acc": float(there == hard == 1)}
        found = {"sample_id": sample, "scores": scores}
        (result_dir / "evaluation" / f"id_{sample}_score.json").write_text(json.dumps(found))
"""
SHOP_AGENT = """
import json, sys
from pathlib import Path
from .call_llm import call_llm

class ShoppingFnAgent:
    def __init__(self, model=None, tool_schema_path=None, sample_id=None, database_base_path=None):
        tools_dir = Path(__file__).resolve().parent.parent / "tools"
        sys.path.insert(0, str(tools_dir))
        sys.path.insert(0, str(tools_dir.parent))
        import tools
        from base_shopping_tool import TOOL_REGISTRY
        cfg = {"database_path": str(Path(database_base_path) / f"case_{sample_id}")}
        self.tool_instances = {name: cls(cfg) for name, cls in TOOL_REGISTRY.items()}

    def _exec_tool(self, name, arguments_json):
        try:
            return self.tool_instances[name].call(arguments_json)
        except Exception as problem:
            return json.dumps({"error": str(problem)})

    def _add_to_cart(self, history_messages):
        return [*history_messages, {"role": "user", "content": "Look at the cart once more."}]
"""
CART_TOOL = """
import json
from pathlib import Path
from base_shopping_tool import register_tool

@register_tool("add_product_to_cart")
class AddProduct:
    def __init__(self, cfg):
        self.place = Path(cfg["database_path"])
    def call(self, params):
        product = json.loads(params)["product_id"]
        known = [json.loads(line)["product_id"] for line in (self.place / "products.jsonl").open()]
        if product not in known:
            raise KeyError(product)
        cart = json.loads((self.place / "cart.json").read_text())
        cart["items"].append({"product_id": product})
        (self.place / "cart.json").write_text(json.dumps(cart))
        return json.dumps({"items": len(cart["items"])})
"""
REGISTRY = """
TOOL_REGISTRY = {}
def register_tool(name):
    def keep(cls):
        TOOL_REGISTRY[name] = cls
        return cls
    return keep
"""
JUDGE = """
import json
def evaluate_single_case(case_dir):
    cart = json.loads((case_dir / "cart.json").read_text())
    wanted = json.loads((case_dir / "validation_cases.json").read_text())["ground_truth_products"]
    wanted = {one["product_id"] for one in wanted}
    found = {one["product_id"] for one in cart["items"]} & wanted
    messages = json.loads((case_dir / "messages.json").read_text())["messages"]
    done = not messages[-1].get("tool_calls") and messages[-1]["role"] == "assistant"
    print("noise")
    return {"case_name": case_dir.name, "success": True, "score": len(found) / len(wanted),
            "case_score": float(found == wanted), "coupon_score": 0.0, "is_completed": done}
"""


def function(name: str, **properties: str) -> dict:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    described = {"name": name, "description": f"{name}.", "parameters": parameters}
    return {"type": "function", "function": described}


def write_checkout(root: Path) -> Path:
    """Write the stand-in below `root`; returns its `benchmark/deepplanning`."""
    base = root / "benchmark" / "deepplanning"
    trip = {"id": "0", "query": "Hefei to Nanjing by train?", "meta_info": {"train": "G2"}}
    columns = "origin_city,destination_city,train_no\n"
    trains = columns + "Hefei,Nanjing,G1\nHefei,Nanjing,G2\nNanjing,Hefei,G3\n"
    call_llm = "import a_package_that_is_not_installed\n"
    files = {
        "travelplanning/data/travelplanning_query_en.json": json.dumps([trip]),
        "travelplanning/tools/tool_schema_en.json": json.dumps(
            [function("query_train_info", origin="string")]
        ),
        "travelplanning/tools/__init__.py": "from .train_query_tool import TrainQueryTool\n",
        "travelplanning/tools/base_travel_tool.py": TRAVEL_BASE,
        "travelplanning/tools/train_query_tool.py": TRAIN_TOOL,
        "travelplanning/agent/__init__.py": "",
        "travelplanning/agent/call_llm.py": call_llm,
        "travelplanning/agent/prompts.py": (
            "def get_system_prompt(language='zh'):\n    return f'Plan a trip ({language}).'\n"
        ),
        "travelplanning/agent/tools_fn_agent.py": TRAVEL_AGENT,
        "travelplanning/database/database_en/id_0/trains/trains.csv": trains,
        "travelplanning/evaluation/__init__.py": "",
        "travelplanning/evaluation/convert_report.py": CONVERT,
        "travelplanning/evaluation/eval_converted.py": EVALUATE,
        "shoppingplanning/data/level_1_query_meta.json": json.dumps(
            [{"id": "1", "query": "Buy the blue shoes."}]
        ),
        "shoppingplanning/tools/shopping_tool_schema.json": json.dumps(
            [function("add_product_to_cart", product_id="string")]
        ),
        "shoppingplanning/tools/__init__.py": "from .add_product import AddProduct\n",
        "shoppingplanning/tools/base_shopping_tool.py": REGISTRY,
        "shoppingplanning/tools/add_product.py": CART_TOOL,
        "shoppingplanning/agent/call_llm.py": call_llm,
        "shoppingplanning/agent/prompts.py": (
            "class Prompts:\n    SYSTEM_PROMPT_level1 = 'Shop.'\nprompt_lib = Prompts()\n"
        ),
        "shoppingplanning/agent/shopping_agent.py": SHOP_AGENT,
        "shoppingplanning/evaluation/evaluation_pipeline.py": JUDGE,
        "shoppingplanning/database/case_1/products.jsonl": (
            '{"product_id": "a"}\n{"product_id": "b"}\n'
        ),
        "shoppingplanning/database/case_1/cart.json": json.dumps({"items": []}),
        "shoppingplanning/database/case_1/validation_cases.json": json.dumps(
            {"ground_truth_products": [{"product_id": "a"}, {"product_id": "b"}]}
        ),
    }
    for name, text in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return base
