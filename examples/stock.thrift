exception NoSuchArticle {
    1: string name,
}

service Stock {
    i32 count(1: string article) throws (1: NoSuchArticle missing),
    void ping(),
}
