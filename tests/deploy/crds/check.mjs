// Checks custom resources, a JSON array on standard input, by the models that npm packages carry:
// their schemas for values, their types for fields that do not exist.
import { readFileSync, writeFileSync } from "node:fs";
import ts from "typescript";

const PACKAGES = {
  "gateway.envoyproxy.io": "@kubernetes-models/envoy-gateway",
  "gateway.networking.k8s.io": "@kubernetes-models/gateway-api",
  "monitoring.coreos.com": "@kubernetes-models/prometheus-operator",
};

const resources = JSON.parse(readFileSync(0, "utf8"));
const typed = [];
const problems = [];
for (const [at, resource] of resources.entries()) {
  const { apiVersion, kind, metadata } = resource;
  const module = `${PACKAGES[apiVersion.split("/")[0]]}/${apiVersion}/${kind}`;
  const model = (await import(module))[kind];
  try {
    new model(resource).validate();
  } catch (error) {
    problems.push(`${kind} ${metadata.name}: ${error.message}`);
  }
  typed.push(`import { I${kind} as T${at} } from "${module}";`);
  typed.push(`export const r${at}: T${at} = ${JSON.stringify(resource)};`);
}

const source = new URL("node_modules/resources.ts", import.meta.url).pathname;
writeFileSync(source, typed.join("\n"));
const options = { noEmit: true, strict: true, skipLibCheck: true, types: [],
  module: ts.ModuleKind.NodeNext, moduleResolution: ts.ModuleResolutionKind.NodeNext };
for (const found of ts.getPreEmitDiagnostics(ts.createProgram([source], options))) {
  problems.push(ts.flattenDiagnosticMessageText(found.messageText, "\n"));
}
console.log(problems.join("\n") || `${resources.length} valid`);
process.exit(problems.length ? 1 : 0);
