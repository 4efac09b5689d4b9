# Register: the one model version of this run, with its verdict and its lineage.
# in: results/<component>/data.json, train/run.json, train/git.json, gate/verdict.json
# out: results/<component>/registration.json
# config: none


rule register_model:
    input:
        data="results/{component}/data.json",
        run="results/{component}/train/run.json",
        git="results/{component}/train/git.json",
        verdict="results/{component}/gate/verdict.json",
    output:
        "results/{component}/registration.json",
    log:
        "logs/register_model/{component}.log",
    benchmark:
        "benchmarks/register_model/{component}.tsv"
    shell:
        "python -m torchrelay register-model --component {wildcards.component} --data {input.data}"
        " --train $(dirname {input.run}) --verdict {input.verdict} --output {output} --log {log}"
