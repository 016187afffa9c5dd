"""What a graph's services are told: YAML, overrides and constructors, merged, checked, and traced to their source.

origin           where a value came from, and how an error says so
document         a YAML file, with the line of every key
overrides        `--Service.key=value` on the command line
layers           merges file and overrides, spreads `Common`
settings         constructor parameters as declared settings: check and convert
service_args     the reserved key `ServiceArgs`: workers, resources, environment
service_config   `ServiceConfig`, what a service's process reads
options          the flags of `dynamo serve` itself
"""
