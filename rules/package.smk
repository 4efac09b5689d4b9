# Package: the signed archive, and the proof that it reproduces its golden outputs in its environment.
# in: results/<component>/registration.json, train/
# out: results/<component>/archive/, archive.json, proof.json
# config: keys, components.<component>.serving


rule package_archive:
    input:
        registration="results/{component}/registration.json",
        run="results/{component}/train/run.json",
        weights="results/{component}/train/model.safetensors",
        golden="results/{component}/train/golden.json",
    output:
        archive="results/{component}/archive/model.mar",
        manifest="results/{component}/archive/manifest.json",
        signature="results/{component}/archive/model.sig",
        record="results/{component}/archive.json",
    log:
        "logs/package_archive/{component}.log",
    benchmark:
        "benchmarks/package_archive/{component}.tsv"
    params:
        serving=lambda wildcards: components.serving_digest(wildcards.component),
        key=archive.key_digest(settings().keys / "dev"),
    shell:
        "python -m torchrelay package-archive --component {wildcards.component}"
        " --registration {input.registration} --train $(dirname {input.run})"
        " --output $(dirname {output.archive}) --record {output.record} --log {log}"


rule prove_archive:
    input:
        archive="results/{component}/archive/model.mar",
        signature="results/{component}/archive/model.sig",
        record="results/{component}/archive.json",
    output:
        "results/{component}/proof.json",
    log:
        "logs/prove_archive/{component}.log",
    benchmark:
        "benchmarks/prove_archive/{component}.tsv"
    shell:
        "python -m torchrelay prove-archive --component {wildcards.component}"
        " --archive $(dirname {input.archive}) --record {input.record} --output {output} --log {log}"
