"Everything about the package stands in settings.ini; this file hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here/"settings.ini", encoding="utf-8")
s = config["DEFAULT"]

setup(
    name=s["lib_name"], version=s["version"], description=s["description"], keywords=s["keywords"].split(),
    author=s["author"], license="Apache-2.0",
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers", "Intended Audience :: Education", "Natural Language :: English",
        "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=["mtst", "mtst.*"]), package_data={"mtst": ["*.tsv", "*.json", "*.mplstyle"]},
    python_requires=">=" + s["min_python"], install_requires=s["requirements"].split(), extras_require={"dev": s["dev_requirements"].split()},
    long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    entry_points={"console_scripts": s["console_scripts"].split(), "nbdev": [f"{s['lib_name']}={s['lib_path']}._modidx:d"]}, zip_safe=False)
