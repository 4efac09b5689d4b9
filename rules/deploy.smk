# Deploy: ask for the version in the dev perimeter (the alias) and converge. A refused version stops here.
# in: results/<component>/archive.json, proof.json, gate/verdict.json
# out: results/<component>/deploy/dev.json
# config: none


rule deploy_model:
    input:
        record="results/{component}/archive.json",
        proof="results/{component}/proof.json",
        verdict="results/{component}/gate/verdict.json",
    output:
        "results/{component}/deploy/dev.json",
    log:
        "logs/deploy_model/{component}.log",
    benchmark:
        "benchmarks/deploy_model/{component}.tsv"
    shell:
        "python -m torchrelay deploy-model --component {wildcards.component}"
        " --record {input.record} --perimeter dev --output {output} --log {log}"
