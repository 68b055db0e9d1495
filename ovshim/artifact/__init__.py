"""Artifacts: a proved graph as a directory that runs elsewhere, without the module's code.

    artifact.json             what is in it, with checksums: sealed JSON, as in the cache
    graph0.xml, graph0.bin    OpenVINO's files, for each kind of call
    graph0.tensors            recorded inputs and outputs: bytes, described in artifact.json

`save` writes one, `read` compiles what is in one and proves it on the recorded answers, `ovms`
lays graphs out for OpenVINO Model Server.
"""
