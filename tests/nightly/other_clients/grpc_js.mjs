// node grpc_js.mjs ADDRESS PROTO, with @grpc/grpc-js and @grpc/proto-loader installed beside it
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { readFileSync } from "node:fs";

const options = { keepCase: true, defaults: true };
const { packtrain } = grpc.loadPackageDefinition(loader.loadSync(process.argv[3], options));
const client = new packtrain.v1.Inference(process.argv[2], grpc.credentials.createInsecure(), {
  "grpc.keepalive_time_ms": 10_000,
});
const call = client.GenerateStream(
  { prompt: { chat: { messages: [{ role: "user", content: "hi" }] } }, sampling: { temperature: 0, max_tokens: 32 } },
  { deadline: Date.now() + 120_000 },
);
let text = "";
call.on("data", (chunk) => (text += chunk.text));
call.on("error", (error) => {
  console.error(error.code, error.details);
  process.exit(1);
});
call.on("end", () => {
  if (text !== "Paris is it.") process.exit(1);
  const about = JSON.parse(readFileSync("node_modules/@grpc/grpc-js/package.json", "utf8"));
  console.log("grpc-js", about.version);
  process.exit(0);
});
