// node llama_cpp.mjs REQUEST.json: what llama.cpp makes of texts and prompts, as JSON on standard output.
// Request: model, a GGUF file; adapter, another or null; texts, [text, whether control tokens are parsed];
// prompts, lists of ids; count, how many ids each is answered with, greedily.
import { readFileSync } from "fs";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const request = JSON.parse(readFileSync(process.argv[2], "utf8"));
const llama = await getLlama({
    gpu: false, build: "never", usePrebuiltBinaries: true, skipDownload: true,
    logLevel: LlamaLogLevel.error, maxThreads: 1,
});
const model = await llama.loadModel({ modelPath: request.model });
const ids = request.texts.map(([text, parsed]) => model.tokenize(text, parsed));
const answers = [];
for (const prompt of request.prompts) {
    const context = await model.createContext({
        contextSize: 512, sequences: 1, threads: 1, flashAttention: false,
        lora: request.adapter ? { adapters: [{ filePath: request.adapter, scale: 1 }] } : undefined,
    });
    const answer = [];
    for await (const id of context.getSequence().evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
        answer.push(id);
        if (answer.length >= request.count) break;
    }
    answers.push(answer);
    await context.dispose();
}
console.log(JSON.stringify({ ids, answers, eos: model.tokens.eos, eot: model.tokens.eot }));
process.exit(0);
