# Train: build the component's environment under the name of its hash, then `mlflow run` in it.
# in: results/<component>/data.json, the component's locks and sources
# out: <state>/environments/<name>/environment.json, results/<component>/train/
# config: variant, components.<component>.training


rule build_environment:
    output:
        f"{STATE}/environments/{{environment}}/environment.json",
    log:
        "logs/build_environment/{environment}.log",
    benchmark:
        "benchmarks/build_environment/{environment}.tsv"
    params:
        component=COMPONENT,
    shell:
        "python -m torchrelay build-environment --component {params.component} --log {log}"


rule train_model:
    input:
        data="results/{component}/data.json",
        environment=lambda wildcards: components.environment_file(components.environment_name(wildcards.component)),
        sources=lambda wildcards: components.training_sources(wildcards.component),
    output:
        run="results/{component}/train/run.json",
        weights="results/{component}/train/model.safetensors",
        golden="results/{component}/train/golden.json",
        evaluation="results/{component}/train/evaluation.json",
        git="results/{component}/train/git.json",
    log:
        "logs/train_model/{component}.log",
    benchmark:
        "benchmarks/train_model/{component}.tsv"
    threads: workflow.cores
    params:
        settings=lambda wildcards: components.training_digest(wildcards.component),
    shell:
        "python -m torchrelay train-model --component {wildcards.component}"
        " --data {input.data} --output $(dirname {output.run}) --log {log}"
