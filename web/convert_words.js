// What the converter says, in the languages of locales/.
import { localeOf } from "./words.js";

const ZH = {
  "{} comes from another node: write its value into the widget":
    "\u8bf7\u628a {} \u7684\u503c\u5199\u8fdb\u63a7\u4ef6\uff1a\u5b83\u6765\u81ea\u53e6\u4e00\u4e2a\u8282\u70b9",
  "the two samplers differ in {}":
    "\u4e24\u4e2a\u91c7\u6837\u5668\u7684 {} \u4e0d\u540c",
  "the two samplers do not run from the first step to the last without a gap":
    "\u4e24\u4e2a\u91c7\u6837\u5668\u6ca1\u6709\u4ece\u7b2c\u4e00\u6b65\u8fde\u7eed\u8fd0\u884c\u5230\u6700\u540e\u4e00\u6b65",
  "one of the two samplers is in a subgraph, the other is not":
    "\u8bf7\u628a\u4e24\u4e2a\u91c7\u6837\u5668\u653e\u8fdb\u540c\u4e00\u4e2a\u56fe\uff1a\u5176\u4e2d\u4e00\u4e2a\u5728\u5b50\u56fe\u91cc",
  "one of the two samplers has no steps":
    "\u5176\u4e2d\u4e00\u4e2a\u91c7\u6837\u5668\u6ca1\u6709\u6b65\u6570",
  "the first sampler ends without noise: set its return_with_leftover_noise to enable":
    "\u8bf7\u628a\u7b2c\u4e00\u4e2a\u91c7\u6837\u5668\u7684 return_with_leftover_noise \u8bbe\u4e3a enable\uff1a\u5b83\u7ed3\u675f\u65f6\u6ca1\u6709\u5269\u4f59\u566a\u58f0",
  "the latent of the first sampler also goes to another node":
    "\u7b2c\u4e00\u4e2a\u91c7\u6837\u5668\u7684 latent \u8fd8\u8fde\u5230\u4e86\u522b\u7684\u8282\u70b9",
  "the two MODELs need one shift: put a ModelSamplingSD3 of the same value on each":
    "\u8bf7\u7ed9\u4e24\u4e2a MODEL \u5404\u63a5\u4e00\u4e2a\u6570\u503c\u76f8\u540c\u7684 ModelSamplingSD3\uff1a\u5b83\u4eec\u9700\u8981\u540c\u4e00\u4e2a shift",
  "the two samplers have other sigmas":
    "\u4e24\u4e2a\u91c7\u6837\u5668\u7684 sigma \u4e0d\u540c",
  "the sigmas of {} do not descend from 1 by at least 0.1 % a step":
    "{} \u7684 sigma \u4e0d\u662f\u4ece 1 \u5f00\u59cb\u3001\u6bcf\u6b65\u81f3\u5c11\u4e0b\u964d 0.1 %",
  "all steps are on one side of the boundary":
    "\u6240\u6709\u6b65\u90fd\u5728\u8fb9\u754c\u7684\u540c\u4e00\u4fa7",
  "{} draws other noise in the second half":
    "{} \u5728\u540e\u534a\u6bb5\u4f7f\u7528\u522b\u7684\u566a\u58f0",
  "Not converted: {}":
    "\u672a\u8f6c\u6362\uff1a{}",
  "{} replaced":
    "\u5df2\u66ff\u6362 {} \u5904",
  "no pair of KSamplerAdvanced and no WanMoeKSampler here":
    "\u8fd9\u91cc\u6ca1\u6709\u6210\u5bf9\u7684 KSamplerAdvanced\uff0c\u4e5f\u6ca1\u6709 WanMoeKSampler",
  "{}":
    "{}",
};

export function said(app, sentence, ...values) {
  const text = localeOf(app).startsWith("zh") ? ZH[sentence] ?? sentence : sentence;
  return values.reduce((whole, value) => whole.replace("{}", value), text);
}
