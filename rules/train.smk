# Train: build the component's environment under the name of its hash, then `mlflow run` in it.
# in: results/<component>/data.json, the component's locks and sources
# out: <state>/environments/<name>/environment.json, results/<component>/train/
# config: variant, components.<component>.training


def environment_of(wildcards):
    return f"{STATE}/environments/{components.environment_name(wildcards.component)}/environment.json"


def sources_of(wildcards):
    return [str(path.relative_to(Path.cwd())) for path in components.training_sources(wildcards.component)]


rule build_environment:
    output:
        f"{STATE}/environments/{{environment}}/environment.json",
    params:
        component=COMPONENT,
    log:
        "logs/build_environment/{environment}.log",
    benchmark:
        "benchmarks/build_environment/{environment}.tsv"
    shell:
        "{PYTHON} -m torchrelay build-environment --component {params.component} --log {log}"


rule train_model:
    input:
        data="results/{component}/data.json",
        environment=environment_of,
        sources=sources_of,
    output:
        run="results/{component}/train/run.json",
        weights="results/{component}/train/model.safetensors",
        golden="results/{component}/train/golden.json",
        evaluation="results/{component}/train/evaluation.json",
    params:
        settings=lambda wildcards: components.training_digest(wildcards.component),
    threads: workflow.cores
    log:
        "logs/train_model/{component}.log",
    benchmark:
        "benchmarks/train_model/{component}.tsv"
    shell:
        "{PYTHON} -m torchrelay train-model --component {wildcards.component}"
        " --data {input.data} --output $(dirname {output.run}) --log {log}"
