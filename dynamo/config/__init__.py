"""Service configuration: YAML files, command-line overrides and constructor defaults, merged and validated.

Every value keeps its source, which error messages and `--dry-run` name.

provenance       where a value came from, and how an error message says so
yaml_file        a YAML file, with the line of every key
overrides        `--Service.key=value` on the command line
merge            merges file and overrides, spreads `Common`
settings         constructor parameters as declared settings: validates and converts values
upstream_keys    names of ai-dynamo 0.1 to 0.3: services, and keys with what becomes of them
upgrade          applies them, and sets aside sections that no service of the graph reads
resolution       all of this in order: from layers to a checked configuration and its notices
service_args     the reserved key `ServiceArgs`: workers, resources, environment
service_config   `ServiceConfig`, which a service's process reads
options          the flags of `dynamo serve` itself
"""
