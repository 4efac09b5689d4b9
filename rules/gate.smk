# Gate: judge the candidate against the floor and against what is live in dev, on the same frozen test set.
# in: results/<component>/train/
# out: results/<component>/gate/verdict.json and report.html (a refusal is a verdict, not a failure)
# config: components.<component>.metric


rule gate_model:
    input:
        run="results/{component}/train/run.json",
        evaluation="results/{component}/train/evaluation.json",
    output:
        verdict="results/{component}/gate/verdict.json",
        report="results/{component}/gate/report.html",
    log:
        "logs/gate_model/{component}.log",
    benchmark:
        "benchmarks/gate_model/{component}.tsv"
    params:
        policy=lambda wildcards: components.gate_digest(wildcards.component),
    shell:
        "python -m torchrelay gate-model --component {wildcards.component}"
        " --train $(dirname {input.run}) --output $(dirname {output.verdict}) --log {log}"
