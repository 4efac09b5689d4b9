# Describe the data: from DVC's lock to the hand-over file that says which version is in place.
# in: dvc.lock (the component's own hash, as a parameter: another component's data never reruns this one)
# out: results/<component>/data.json
# config: none


rule describe_data:
    output:
        "results/{component}/data.json",
    log:
        "logs/describe_data/{component}.log",
    benchmark:
        "benchmarks/describe_data/{component}.tsv"
    params:
        hash=lambda wildcards: data.version(wildcards.component).hash,
    shell:
        "python -m torchrelay describe-data --component {wildcards.component} --output {output} --log {log}"
