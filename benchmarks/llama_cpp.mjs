// node llama_cpp.mjs MODEL.gguf THREADS: decoding by llama.cpp. For each line of JSON on standard input, {"prompts":
// lists of ids, "count": new ids}, a line of [ids, times]: of each prompt its new ids and when each was there, in seconds.
import { createInterface } from "readline";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const [modelPath, threads] = [process.argv[2], Number(process.argv[3])];
const llama = await getLlama({
    gpu: false, build: "never", usePrebuiltBinaries: true, skipDownload: true,
    logLevel: LlamaLogLevel.error, maxThreads: threads,
});
const model = await llama.loadModel({ modelPath });

for await (const line of createInterface({ input: process.stdin })) {
    const { prompts, count } = JSON.parse(line);
    const context = await model.createContext({
        contextSize: prompts[0].length + count + 8, sequences: prompts.length, threads: { ideal: threads, min: threads },
        batchSize: Math.max(512, prompts.length), flashAttention: true,
    });
    const answers = await Promise.all(prompts.map(async (prompt) => {
        const [ids, times] = [[], []];
        for await (const id of context.getSequence().evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
            ids.push(id);
            times.push(performance.now() / 1000);
            if (ids.length >= count) break;
        }
        return [ids, times];
    }));
    await context.dispose();
    console.log(JSON.stringify(answers));
}
process.exit(0);
